"""Every setting of an offloaded model, in one frozen dataclass, and the one place that reads the environment.

    explicit argument  >  environment variable MOE_OFFLOAD_<FIELD>  >  default

The budget, the profile and the device map are not settings: they describe one model on one machine, and are arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import ConfigError
from .policies import POLICIES
from .sizes import parse_size

AUTO_SCRATCH_BYTES = 128 * 10**6
ENVIRONMENT_PREFIX = "MOE_OFFLOAD_"


@dataclass(frozen=True)
class OffloadConfig:
    """How a model is offloaded. No setting changes what the model computes.

    policy: which resident expert gives way; a name in `moe_offload.policies.POLICIES`.
    half_life: tokens after which a past use of an expert counts half ("decayed_lfu"; the others have their own).
    experts_implementation: the transformers experts code to rewrite: "grouped_mm", "batched_mm", or "auto": the model's
        own if it is one of these two, else "grouped_mm".
    compile: what runs the rewritten graph: "inductor", "graph" (as it is, nothing generated), or "auto": "graph" on a
        CPU, "inductor" elsewhere.
    overlap: compute the experts that are resident while the missing ones load, in decode too, rather than wait for all
        of them; None: where the graph runs as it is (Inductor fuses what is not cut into waves).
    lookahead: ask each layer's router one layer early, and load what it names in the background. Whether that pays is
        measured while the model runs, and it is switched off where it does not.
    dynamic: as in torch.compile. True gives two graphs for good, one for prefill and one for decode; None lets Dynamo
        decide; False compiles once per shape.
    wave_rows: rows (experts) of scratch through which prefill streams what is not resident, and into which it reads
        ahead: "auto", as many as 128 MB hold, 4 at least and 16 at most; or their number.
    kv_tokens: tokens of KV cache that the automatic reserve makes room for.
    reserve: what the budget keeps free of experts for KV cache and workspace: "auto", or a size (bytes or "1GB").
    offload_folder: where the experts of an already loaded model are spilled; None: the temporary folder of the system.
    poison: fill free slots with NaN, so that reading one shows. For tests; costs a fill per eviction.
    prewarm: load the expected hottest experts before the first token.
    fullgraph: as in torch.compile: a graph break is an error.

    Raises ConfigError, naming the field, its value and what it accepts.
    """

    policy: str = "successors"
    half_life: float = 32.0
    experts_implementation: str = "auto"
    compile: str = "auto"
    overlap: bool | None = None
    lookahead: bool = False
    dynamic: bool | None = True
    wave_rows: str | int = "auto"
    kv_tokens: int = 2048
    reserve: str | int = "auto"
    offload_folder: str | None = None
    poison: bool = False
    prewarm: bool = True
    fullgraph: bool = False

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if not rule.holds(value):
                raise ConfigError(f"{name}={value!r} is not accepted: it takes {rule.accepted()}")
            object.__setattr__(self, name, value)

    def scratch_rows(self, row_bytes: int) -> int:
        """How many scratch rows of this size a model gets."""
        if isinstance(self.wave_rows, int):
            return self.wave_rows
        return max(4, min(16, AUTO_SCRATCH_BYTES // row_bytes))

    @property
    def reserve_bytes(self) -> int | None:
        """`reserve` in bytes; None when it is "auto" and the planner works it out."""
        return None if self.reserve == "auto" else _reserve_bytes(self.reserve)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OffloadConfig:
        """A config with `values` in place of the defaults. An unknown key raises ConfigError with the nearest name."""
        _refuse_unknown(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values: `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)


def resolve(config: OffloadConfig | Mapping[str, Any] | None = None, **overrides: Any) -> OffloadConfig:
    """The settings in force: `overrides`, else `config`, else the environment, else the default.

    An OffloadConfig is explicit in every field, so the environment has no say; a dict only in the keys it holds.
    Raises ConfigError; for a value from the environment it names the variable.
    """
    if isinstance(config, OffloadConfig):
        _refuse_unknown(overrides)
        return dataclasses.replace(config, **overrides)
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(
            f"config={config!r} is not accepted: it takes an OffloadConfig, a dict of its fields, or None"
        )
    explicit = {**(config or {}), **overrides}
    _refuse_unknown(explicit)
    return OffloadConfig(**{**_from_environment(skip=explicit), **explicit})


class Rule(NamedTuple):
    """What a field accepts: as a test, and in words."""

    holds: Callable[[Any], bool]
    accepted: Callable[[], str]


def _choice(*names: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in names, lambda: _any_of(names))


def _flag() -> Rule:
    return Rule(lambda value: isinstance(value, bool), lambda: "True or False")


def _at_least(smallest: int, unit: str) -> Rule:
    return Rule(lambda value: _is_int(value) and value >= smallest, lambda: f"{unit}: an integer of {smallest} or more")


def _any_of(names: Any) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_half_life(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and 0 < value < math.inf


def _reserve_bytes(value: Any) -> int:
    # No reserve at all is a useful thing to ask for (an exact floor in a test); as a size, zero is refused.
    return 0 if _is_int(value) and value == 0 else parse_size(value)


def _is_reserve(value: Any) -> bool:
    try:
        return value == "auto" or _reserve_bytes(value) >= 0
    except ConfigError:
        return False


#: One rule a field. Functions, so that a policy added to the table later is accepted and named.
RULES: dict[str, Rule] = {
    "policy": Rule(lambda value: isinstance(value, str) and value in POLICIES, lambda: _any_of(POLICIES)),
    "half_life": Rule(_is_half_life, lambda: "tokens: a finite number above 0"),
    "experts_implementation": _choice("auto", "grouped_mm", "batched_mm"),
    "compile": _choice("auto", "inductor", "graph"),
    "overlap": Rule(lambda value: value is None or isinstance(value, bool), lambda: "True, False or None"),
    "lookahead": _flag(),
    "dynamic": Rule(lambda value: value is None or isinstance(value, bool), lambda: "True, False or None"),
    "wave_rows": Rule(
        lambda value: value == "auto" or (_is_int(value) and value >= 1),
        lambda: 'rows of scratch: "auto", or an integer of 1 or more',
    ),
    "kv_tokens": _at_least(0, "tokens of KV cache"),
    "reserve": Rule(_is_reserve, lambda: '"auto", bytes (0 for none), or a size such as "1GB" or "512MiB"'),
    "offload_folder": Rule(
        lambda value: value is None or (isinstance(value, str) and value != ""), lambda: "the path of a folder, or None"
    ),
    "poison": _flag(),
    "prewarm": _flag(),
    "fullgraph": _flag(),
}


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in RULES:
            near = difflib.get_close_matches(str(key), RULES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "the fields are " + ", ".join(RULES)
            raise ConfigError(f"unknown setting {key!r}: {hint}")


def _from_environment(*, skip: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set by MOE_OFFLOAD_<FIELD>, parsed; those in `skip` are settled and not looked at."""
    found = {}
    for field in dataclasses.fields(OffloadConfig):
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        text = os.environ.get(variable, "").strip()
        if field.name in skip or not text:  # a variable set to nothing is the shell's way to unset one
            continue
        try:
            value = PARSERS[str(field.type)](text)
        except (ValueError, KeyError):
            value = text  # of the wrong type: the field's rule refuses it in its own words
        try:
            OffloadConfig(**{field.name: value})
        except ConfigError as error:
            raise ConfigError(f"environment variable {variable}: {error}") from None
        found[field.name] = value
    return found


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

#: From a field's declared type to the reading of its environment variable.
PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "str | int": lambda text: int(text) if text.isdecimal() else text,
    "int": int,
    "float": float,
    "bool": lambda text: _BOOLEANS[text.lower()],
    "bool | None": lambda text: None if text.lower() == "none" else _BOOLEANS[text.lower()],
}
