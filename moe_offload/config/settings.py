"""Every setting of an offloaded model, in one frozen dataclass, and the one place that reads the environment.

    keyword argument or flag  >  environment variable MOE_OFFLOAD_<FIELD>  >  configuration file  >  default

The file is the one that was named (`config="settings.yaml"`, `--config-file`), else the one MOE_OFFLOAD_CONFIG_FILE
names, else $HF_HOME/moe_offload/default_config.yaml if there is one. `accelerate launch` and `torchrun` hand the
environment on to every process, so both work under them.

Longer than 250 lines for the docstring of `OffloadConfig`, which is the page that users read.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ProfileError
from . import file as config_file
from .rules import RULES, reserve_bytes
from .usage import AUTO, profile_path

ENVIRONMENT_PREFIX = "MOE_OFFLOAD_"
FILE_VARIABLE = "MOE_OFFLOAD_CONFIG_FILE"
KEY_VARIABLE = "MOE_OFFLOAD_API_KEY"  # no setting: a secret of `serve`, which flags would show to every user
DEFAULT = "default"


@dataclass(frozen=True)
class OffloadConfig:
    """How a model is offloaded. No setting but `compute` changes what the model computes.

    Args:
        budget: Bytes the model may hold on the device it computes on (dense weights, expert slots, KV cache,
            workspace): bytes, "8GB", "8GiB", "80%" of what is available, or "auto"; None: what `max_memory` says, else
            "auto".
        device_map: Where weights and expert rows go, in accelerate's grammar (`device_map.py`); None: "auto".
        max_memory: Limits per device, as {"cpu": "60GiB"} (`device_map.py`).
        profile: Which experts to expect, and to load before anything asks for them. "auto": those that earlier runs of
            this model have used, which every run remembers (`docs/remembering-usage.md`); "auto:italian" or "italian":
            the same for a workload of that name; "off"; or the path of a profile, and nothing is remembered.
        policy: Which resident expert gives way; a name in `moe_offload.cache.POLICIES`.
        half_life: Tokens after which a past use of an expert counts half ("decayed_lfu"; the others have their own).
        experts_implementation: The transformers experts code to rewrite: "grouped_mm", "batched_mm", or "auto": the
            model's own, if it is one of these two; a model that has chosen "eager" is refused on a CPU. On a GPU it is
            always "grouped_mm".
        compile: What runs the rewritten graph: "inductor", "graph" (as it is, nothing generated), or "auto": "graph" on
            a CPU, "inductor" elsewhere.
        compute: "exact": each product as plain transformers computes it, to the bit. "fast": on a CPU, bfloat16
            products of up to 4 tokens at memory speed, in another order of sums (`docs/fast.md`: what may differ).
            "packed": products of up to 8 tokens by quantised experts straight from their codes, in float32.
        decide: Who says which expert gives way while decoding: "host"; "device", without the host having to wait for
            ids, in the layers whose rows rest in RAM, by "decayed_lfu" (the host in the others, by `policy`); or
            "auto": the device where it is a GPU.
        overlap: Compute the experts that are resident while the missing ones load, in decode too, rather than wait for
            all of them; None: where the graph runs as it is (Inductor fuses what is not cut into waves).
        lookahead: Ask each layer's router one layer early, and load what it names in the background; where the device
            decides, on a second stream of the same step. Whether that pays is measured while the model runs, and it is
            switched off where it does not.
        dynamic: As in torch.compile. True gives two graphs for good, one for prefill and one for decode; None lets
            Dynamo decide; False compiles once per shape.
        wave_rows: Rows (experts) of scratch through which prefill streams what is not resident, and into which it reads
            ahead: "auto", as many as 128 MB hold, 4 at least and 16 at most (on a GPU 320 MB and 32); or their number.
        kv_tokens: Tokens of KV cache that the automatic reserve makes room for.
        kv_sequences: How many KV caches of `kv_tokens` there is to be room for: requests that are computed together.
        reserve: What the budget keeps free of experts for KV cache and workspace: "auto", or a size (bytes or "1GB").
        offload_folder: Where the experts of an already loaded model are spilled; None: the temporary folder of the
            system.
        lock_memory: Whether slots and scratch are locked in main memory, so that they are neither swapped out nor
            compressed: True, or an error where the system's limit does not allow it; False; or "auto": as far as it
            allows, where the budget is more than half of the machine's memory, or of a rank's even part of it.
        rank_timeout: Seconds that one process of several (`docs/several-machines.md`) waits for another before it gives
            up, with an error that names it. A rank that was killed or has failed is noticed at once.
        untested: Compute on a GPU, which no version has done yet. Compare its tokens with those of the resident model.
        poison: Fill free slots with NaN, so that reading one shows. For tests; costs a fill per eviction.
        prewarm: Load the expected hottest experts before the first token.
        fullgraph: As in torch.compile: a graph break is an error.
        live: Let `moe-offload top` watch the model, through a socket that only this user can open. `moe-offload run`
            does.

    Raises:
        ConfigError: A field, which is named with its value, does not accept it.

    Example:

        ```python
        settings = moe_offload.OffloadConfig(budget="8GB", policy="lru")
        model = moe_offload.from_pretrained("Qwen/Qwen3-30B-A3B", config=settings)
        ```
    """

    budget: str | int | None = None
    device_map: str | dict[str, str | int] | None = None
    max_memory: dict[str | int, str | int] | None = None
    profile: str = AUTO
    policy: str = "successors"
    half_life: float = 32.0
    experts_implementation: str = "auto"
    compile: str = "auto"
    compute: str = "exact"
    decide: str = "auto"
    overlap: bool | None = None
    lookahead: bool = False
    dynamic: bool | None = True
    wave_rows: str | int = "auto"
    kv_tokens: int = 2048
    kv_sequences: int = 1
    reserve: str | int = "auto"
    offload_folder: str | None = None
    lock_memory: str | bool = "auto"
    rank_timeout: float = 600.0
    untested: bool = False
    poison: bool = False
    prewarm: bool = True
    fullgraph: bool = False
    live: bool = False

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            value = rule.plain(getattr(self, name))
            if not rule.holds(value):
                raise ConfigError(f"{name}={value!r} is not accepted: {rule.refused(value)}")
            object.__setattr__(self, name, value)

    @property
    def reserve_bytes(self) -> int | None:
        """`reserve` in bytes; None when it is "auto" and the planner works it out."""
        return None if self.reserve == "auto" else reserve_bytes(self.reserve)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OffloadConfig:
        """A config with `values` in place of the defaults. An unknown key raises ConfigError with the nearest name."""
        _refuse_unknown(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values: `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, text: str) -> OffloadConfig:
        return cls.from_dict(config_file.from_json(text))

    def to_json(self) -> str:
        return config_file.to_json(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> OffloadConfig:
        """As `from_dict`; YAML of plain values only, see `parse_yaml` in file.py."""
        return cls.from_dict(config_file.from_yaml(text))

    def to_yaml(self) -> str:
        return config_file.to_yaml(self.to_dict())

    def changed(self) -> dict[str, Any]:
        """The fields that differ from the default: all that a file needs to hold."""
        return {name: value for name, value in self.to_dict().items() if value != getattr(OffloadConfig, name)}


#: What functions take as `config`: a whole one, some of its fields, or the path of a file.
Config = OffloadConfig | Mapping[str, Any] | str | Path | None


def resolve_settings(config: Config = None, **overrides: Any) -> OffloadConfig:
    """The settings in force: `overrides`, else `config`, else the environment, else the file, else the default.

    An OffloadConfig is explicit in every field, so environment and file have no say; a dict only in the keys it holds.
    A path names the file. Raises ConfigError, or ProfileError for a profile that is not there, naming the
    variable or the file that a value is from.
    """
    if isinstance(config, OffloadConfig):
        _refuse_unknown(overrides)
        return dataclasses.replace(config, **overrides)
    return OffloadConfig(**{name: value for name, (value, _) in _gather(config, overrides).items()})


def find_origins(config: Config = None, **overrides: Any) -> dict[str, str]:
    """Where `resolve_settings` would take each field from: "argument", a variable, a file, or "default"."""
    found = dict.fromkeys(RULES, "argument" if isinstance(config, OffloadConfig) else DEFAULT)
    if not isinstance(config, OffloadConfig):
        found |= {name: origin for name, (_, origin) in _gather(config, overrides).items()}
    return found


def active_file(named: str | Path | None = None) -> Path | None:
    """The configuration file that counts: the named one, that of the environment, or the default one if it is there."""
    wanted = str(named or "").strip() or os.environ.get(FILE_VARIABLE, "").strip()
    if wanted:
        return Path(wanted).expanduser()
    default = config_file.default_path()
    return default if default.exists() else None


def given_key() -> str | None:
    """What MOE_OFFLOAD_API_KEY says; None if it is not set. `serve` refuses an empty one: it would need no key."""
    return os.environ.get(KEY_VARIABLE)


def _gather(config: Config, overrides: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """`{field: (value, where it is from)}` of all fields that somebody has set."""
    if not isinstance(config, (Mapping, str, os.PathLike, type(None))) or config == "":
        kind = type(config).__name__
        what = f"config=<{kind}>" if kind.endswith("Config") else f"config={str(config)[:60]!r}"
        hint = "; fields of the model's own configuration are keywords of from_pretrained" if "<" in what else ""
        raise ConfigError(
            f"{what} is not accepted: it takes an OffloadConfig, a dict of its fields, the path of a "
            f"configuration file, or None{hint}"
        )
    _refuse_unknown_variables()
    explicit = {**(config if isinstance(config, Mapping) else {}), **overrides}
    _refuse_unknown(explicit)
    file = active_file(None if isinstance(config, Mapping) else config)
    found = _from_file(file, skip=explicit) if file is not None else {}
    return found | _from_environment(skip=explicit) | {name: (value, "argument") for name, value in explicit.items()}


def _refuse_unknown_variables() -> None:
    """A misspelt variable would be a setting that silently does not count."""
    known = {ENVIRONMENT_PREFIX + name.upper() for name in RULES} | {FILE_VARIABLE, KEY_VARIABLE}
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`moe-offload config --show` lists the settings"
            raise ConfigError(f"unknown environment variable {name}: {hint}")


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in RULES:
            near = difflib.get_close_matches(str(key), RULES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "the fields are " + ", ".join(RULES)
            raise ConfigError(f"unknown setting {key!r}: {hint}")


def _from_file(path: Path, *, skip: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """The fields that the file sets; those in `skip` are settled and their values are not looked at."""
    values = config_file.read_settings(path)
    where = f"configuration file {path}"
    try:
        _refuse_unknown(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return {name: (_checked(where, name, value), where) for name, value in values.items() if name not in skip}


def _from_environment(*, skip: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """The fields that are set by MOE_OFFLOAD_<FIELD>, parsed; those in `skip` are settled and not looked at."""
    found = {}
    for field in dataclasses.fields(OffloadConfig):
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        text = os.environ.get(variable, "").strip()
        if field.name in skip or not text:  # a variable set to nothing is the shell's way to unset one
            continue
        where = f"environment variable {variable}"
        found[field.name] = _checked(where, field.name, from_text(field.name, text)), where
    return found


def _checked(where: str, name: str, value: Any) -> Any:
    """`value` in its plain form. A profile that is not there is refused here, where it is known who named it."""
    try:
        plain_value = getattr(OffloadConfig(**{name: value}), name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if name == "profile" and (path := profile_path(plain_value)) is not None and not Path(path).exists():
        raise ProfileError(f"{where}: profile={path!r}: there is no such file. Correct the path, or remove it")
    return plain_value


def from_text(name: str, text: str) -> Any:
    """What `text`, typed at a shell, means for the field `name`; as it is where it means nothing, for the field's rule
    to refuse in its own words. Mappings are written as in YAML: '{0: 8GB, cpu: 60GiB}'."""
    try:
        return PARSERS[str(OffloadConfig.__annotations__[name])](text)
    except (ValueError, KeyError):
        return text


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _mapping_or_text(text: str) -> Any:
    return config_file.parse_yaml(text) if text.startswith("{") else text


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

#: From a field's declared type to the reading of its environment variable or flag.
PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "str | int": _number_or_text,
    "str | int | None": _number_or_text,
    "int": int,
    "float": float,
    "bool": lambda text: _BOOLEANS[text.lower()],
    "str | bool": lambda text: _BOOLEANS.get(text.lower(), text),
    "bool | None": lambda text: None if text.lower() == "none" else _BOOLEANS[text.lower()],
    "str | dict[str, str | int] | None": _mapping_or_text,
    "dict[str | int, str | int] | None": _mapping_or_text,
}
