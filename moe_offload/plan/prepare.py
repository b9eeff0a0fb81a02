"""What is settled about a model before anything is loaded or changed: made once, from its shapes, and handed on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.settings import Config, OffloadConfig, resolve_settings
from ..config.sizes import format_size
from ..config.usage import profile_path, usage_folder, workload_of
from ..errors import ConfigError, UnsupportedModelError
from ..experts import MoELayer
from ..files.system import missing_call
from ..memory.devices import usable_kinds
from ..memory.locking import bytes_to_lock
from ..memory.machine import Memory
from ..observe.profile import Fingerprint, Profile
from ..observe.usage import UsageFile
from .arrange import Arrangement, arrange_layers, memory_of_rank
from .shares import profile_of_share
from .weights import take_fingerprint

logger = logging.getLogger("moe_offload")


@dataclass(frozen=True)
class Prepared:
    """`row_bytes[l]` is the size of a row of layer l, by which they were planned; `profile` is one of this model, and
    `usage` the file that it is from where it was remembered, and where usage is remembered from now on. So
    many bytes of slots and scratch are to be locked in memory."""

    settings: OffloadConfig
    arrangement: Arrangement
    fingerprint: Fingerprint
    profile: Profile | None
    usage: UsageFile | None
    row_bytes: tuple[int, ...]
    lock_bytes: int

    def check_rows(self, moe_layers: Sequence[MoELayer]) -> None:
        """Raise `UnsupportedModelError` where a loaded model's rows are not those that were planned for."""
        for moe, planned in zip(moe_layers, self.row_bytes, strict=True):
            if moe.layout.row_bytes != planned:
                raise UnsupportedModelError(
                    f"{moe.name}: transformers loaded its experts as rows of {moe.layout.row_bytes} bytes, its "
                    f"configuration says {planned}; say a dtype that it keeps, such as dtype='float32'"
                )


def settings_of(config: Config, **given: Any) -> OffloadConfig:
    """The settings in force. An argument that is None was not given; a `Profile` object is no setting, its path is."""
    said = {name: value for name, value in given.items() if value is not None and not isinstance(value, Profile)}
    return resolve_settings(config, **said)


def prepare_model(
    model: Any,
    moe_layers: Sequence[MoELayer],
    settings: OffloadConfig,
    profile: Profile | str | Path | None = None,
    asked_for: str | Path = "",
    found_on: str = "cpu",
) -> Prepared:
    """Plan `model`, which may be on the meta device, for the devices of this process, and read its profile.

    Its usage is remembered under the name that `asked_for`, what it was loaded by, gives it. A model that was
    `found_on` an accelerator stays there, unless the settings have a device map.
    Raises `ConfigError`, `BudgetError`, `UnsupportedModelError`, or `ProfileError` for the profile of another model.
    """
    _check_system()
    if found_on != "cpu" and settings.device_map is None:
        settings = replace(settings, device_map={"": found_on})
    arrangement = arrange_layers(model, moe_layers, settings, usable=usable_kinds(settings.untested))
    arrangement.check_one_device()
    if arrangement.device != "cpu" and settings.experts_implementation == "batched_mm":
        raise ConfigError(
            f"experts_implementation='batched_mm' on {arrangement.device}: that code copies the matrices of every "
            "token-expert pair at each step before it multiplies by them. Use 'grouped_mm', whose products read them "
            "where they are, or 'auto'"
        )
    if arrangement.device == "cpu" and settings.experts_implementation == "auto" and settings.compute != "fast":
        _refuse_loops(moe_layers)
    expected = take_fingerprint(model, moe_layers)
    memory = memory_of_rank(moe_layers)
    _warn_beyond_memory(arrangement, memory)
    usage = None  # a rank uses its share of the experts only, so its usage is no one else's
    if not isinstance(profile, Profile) and all(moe.share is None for moe in moe_layers):
        usage = _usage_file(settings.profile, name_of(model, asked_for), expected)
    loaded = load_profile(profile, settings, expected) if usage is None else usage.read()
    loaded = loaded and profile_of_share(loaded, moe_layers)
    rows = tuple(moe.layout.row_bytes for moe in moe_layers)
    return Prepared(settings, arrangement, expected, loaded, usage, rows, _bytes_to_lock(arrangement, settings, memory))


def _refuse_loops(moe_layers: Sequence[MoELayer]) -> None:
    """Raise where the model's own choice is a loop over its experts, which adds up otherwise than what is rewritten."""
    for moe in moe_layers:
        config = getattr(moe.modules[0], "config", None)
        if moe.form == "interface" and getattr(config, "_experts_implementation", None) == "eager":
            raise UnsupportedModelError(
                f"{moe.name}: this model runs its experts by the implementation 'eager', whose last bits are not those "
                "of the two that can be offloaded. config={'experts_implementation': 'grouped_mm'} "
                "(--experts-implementation grouped_mm) runs it by another, with the bits that plain transformers has "
                "with experts_implementation='grouped_mm'"
            )


def _check_system() -> None:
    missing = missing_call()
    if missing is not None:
        raise UnsupportedModelError(
            f"this system ({sys.platform}) has no {missing}, through which experts are read and written; run it on "
            "Linux (on Windows: in WSL 2) or macOS"
        )


def name_of(model: Any, asked_for: str | Path = "") -> str:
    """What a model calls itself: the name of its repository or of its folder, or else its class."""
    name = str(asked_for or getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    name = Path(name).resolve().name if Path(name).is_absolute() or Path(name).exists() else name
    return "".join(c for c in name if c.isprintable())[:200] or type(model).__name__


def load_profile(
    profile: Profile | str | Path | None, settings: OffloadConfig, expected: Fingerprint
) -> Profile | None:
    """The profile that was given or is named in `settings`, of the model with that fingerprint; None where neither is.

    Raises `ProfileError`.
    """
    if isinstance(profile, Profile):
        loaded = profile
    elif (path := profile_path(settings.profile)) is not None:
        loaded = Profile.load(path)
    else:
        return None
    loaded.check(expected)
    return loaded


def _usage_file(said: str, name: str, expected: Fingerprint) -> UsageFile | None:
    """Where the model's usage is remembered; None where it is not to be, or nothing may be written."""
    workload = workload_of(said)
    if workload is None:
        return None
    folder = usage_folder()
    if folder is None:
        logger.info("usage is not remembered: nothing may be written in $HF_HOME/moe_offload")
        return None
    return UsageFile.of_model(folder, name, workload, expected)


def _bytes_to_lock(arrangement: Arrangement, settings: OffloadConfig, memory: Memory) -> int:
    """Of the slots and scratch in main memory, of which this process can have `memory`.

    Raises `ConfigError` where all of them are to be locked, and may not be.
    """
    plan = arrangement.plans.get("cpu")
    if plan is None:
        return 0
    needed = plan.bank_bytes + plan.costs.scratch_bytes
    return bytes_to_lock(settings.lock_memory, needed, plan.budget_bytes, memory.total)


def _warn_beyond_memory(arrangement: Arrangement, memory: Memory) -> None:
    plan = arrangement.plans.get("cpu")
    if plan is not None and plan.budget_bytes > memory.total:
        logger.warning(
            "the budget of %s is more than %s (%s); what does not fit is swapped or killed",
            format_size(plan.budget_bytes), memory.bound, format_size(memory.total),
        )  # fmt: skip
