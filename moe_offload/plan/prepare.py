"""What is settled about a model before anything is loaded or changed: made once, from its shapes, and handed on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ..config.settings import Config, OffloadConfig, resolve_settings
from ..config.sizes import format_size
from ..errors import UnsupportedModelError
from ..experts import MoELayer
from ..memory.devices import usable_kinds
from ..observe.profile import Fingerprint, Profile
from .arrange import Arrangement, arrange_layers
from .weights import take_fingerprint

logger = logging.getLogger("moe_offload")


@dataclass(frozen=True)
class Prepared:
    """`row_bytes[l]` is the size of a row of layer l, by which they were planned; `profile` is one of this model."""

    settings: OffloadConfig
    arrangement: Arrangement
    fingerprint: Fingerprint
    profile: Profile | None
    row_bytes: tuple[int, ...]

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
    found_on: str = "cpu",
) -> Prepared:
    """Plan `model`, which may be on the meta device, for the devices of this process, and read its profile.

    A model that was `found_on` an accelerator stays there, unless the settings have a device map.

    Raises `ConfigError`, `BudgetError`, `UnsupportedModelError`, or `ProfileError` for the profile of another model.
    """
    if found_on != "cpu" and settings.device_map is None:
        settings = replace(settings, device_map={"": found_on})
    arrangement = arrange_layers(model, moe_layers, settings, usable=usable_kinds(settings.untested))
    arrangement.check_one_device()
    if arrangement.device != "cpu" and any(moe.packed for moe in moe_layers):
        raise UnsupportedModelError(
            f"asked to compute on {arrangement.device} with quantised experts; their weights are unpacked by the CPU "
            'alone so far. Leave device_map out (or device_map="cpu"), or use a checkpoint in bfloat16'
        )
    expected = take_fingerprint(model, moe_layers)
    _warn_beyond_memory(arrangement)
    loaded = load_profile(profile or settings.profile, expected)
    return Prepared(settings, arrangement, expected, loaded, tuple(moe.layout.row_bytes for moe in moe_layers))


def load_profile(profile: Profile | str | Path | None, expected: Fingerprint) -> Profile | None:
    """The profile, read if it is a path, of the model with that fingerprint. Raises `ProfileError`."""
    if profile is None:
        return None
    loaded = profile if isinstance(profile, Profile) else Profile.load(profile)
    loaded.check(expected)
    return loaded


def _warn_beyond_memory(arrangement: Arrangement) -> None:
    memory, plan = psutil.virtual_memory().total, arrangement.plans.get("cpu")
    if plan is not None and plan.budget_bytes > memory:
        logger.warning(
            "the budget of %s is more than this machine's memory (%s); what does not fit is swapped or killed",
            format_size(plan.budget_bytes), format_size(memory),
        )  # fmt: skip
