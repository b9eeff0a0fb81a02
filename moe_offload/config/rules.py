"""What each setting accepts: for each field of `OffloadConfig` one rule, which is a test and says in words what passes.

A value that is accepted is also brought into its plain form: a path becomes text, a device "0" the number 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..cache import POLICIES
from ..errors import ConfigError
from .device_map import device_name
from .launched import budget_of_rank
from .sizes import parse_size, size_problem
from .usage import plain_profile, profile_problem


def to_plain(value: Any) -> Any:
    """`value` as JSON and YAML can hold it, with device numbers as numbers (JSON makes every key a string)."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_number(key): _number(item) for key, item in value.items()}
    return value


class Rule(NamedTuple):
    """What a field accepts: `holds` as a test, `accepted` in words. `wrong` may say what is wrong with a value; `plain`
    brings it into its plain form first."""

    holds: Callable[[Any], bool]
    accepted: Callable[[], str]
    wrong: Callable[[Any], str | None] = lambda _: None
    plain: Callable[[Any], Any] = to_plain

    def refused(self, value: Any) -> str:
        """Of a value that is not accepted: what is wrong with it, and what would be right."""
        wrong = self.wrong(value)
        return f"{wrong}; it takes {self.accepted()}" if wrong else f"it takes {self.accepted()}"


def reserve_bytes(value: Any) -> int:
    """`reserve` in bytes. No reserve at all is a useful thing to ask for (an exact floor in a test); as a size, zero is
    refused."""
    return 0 if _is_int(value) and value == 0 else parse_size(value)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 4 else value


def _choice(*names: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in names, lambda: _any_of(names))


def _flag() -> Rule:
    return Rule(lambda value: isinstance(value, bool), lambda: "True or False")


def _flag_or_none() -> Rule:
    return Rule(lambda value: value is None or isinstance(value, bool), lambda: "True, False or None")


def _path(what: str) -> Rule:
    return Rule(lambda value: value is None or (isinstance(value, str) and value != ""), lambda: f"{what}, or None")


def _at_least(smallest: int, unit: str) -> Rule:
    return Rule(lambda value: _is_int(value) and value >= smallest, lambda: f"{unit}: an integer of {smallest} or more")


def _any_of(names: Any) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and 0 < value < math.inf


def _is_reserve(value: Any) -> bool:
    try:
        return value == "auto" or reserve_bytes(value) >= 0
    except ConfigError:
        return False


def _wrong_size(value: Any) -> str | None:
    return size_problem(value, total=2**40)


def _wrong_device(value: Any) -> str | None:
    """Only the form is checked: a device need not be in this machine, since one can plan for others."""
    try:
        device_name("", value)
    except ConfigError:
        return f"{value!r} is no device"
    return None


def _wrong_device_map(value: Any) -> str | None:
    """Whether the keys name modules is checked by device_map.py, where the model is known."""
    if isinstance(value, str) and "{" not in value:
        return _wrong_device(value)
    return _wrong_map(value) or next(filter(None, map(_wrong_device, value.values())), None)


def _wrong_limits(value: Any) -> str | None:
    if wrong := _wrong_map(value) or next(filter(None, map(_wrong_device, value)), None):
        return wrong
    return next((f"of {device!r}, {wrong}" for device, size in value.items() if (wrong := _wrong_size(size))), None)


def _wrong_map(value: Any) -> str | None:
    if isinstance(value, str) and "{" in value:
        return "the mapping cannot be read"
    if not isinstance(value, dict):
        return "it is no mapping"
    wrong = [key for key in value if not (isinstance(key, str) or _is_int(key))]
    return f"{wrong[0]!r} is no key" if wrong else None


def _or_none(wrong: Callable[[Any], str | None]) -> Callable[[Any], bool]:
    return lambda value: value is None or wrong(value) is None


#: One rule a field. `accepted` is a function because `POLICIES` may get entries after this module was imported.
RULES: dict[str, Rule] = {
    "budget": Rule(
        _or_none(_wrong_size),
        lambda: 'bytes, a size such as "8GB" or "8GiB", "80%" of the memory available, "auto", or None',
        _wrong_size,
        lambda value: to_plain(budget_of_rank(value)),
    ),
    "device_map": Rule(
        _or_none(_wrong_device_map),
        lambda: '"auto", "disk", "cpu", an accelerator (0, "cuda:0"), a mapping {module: device}, or None',
        _wrong_device_map,
    ),
    "max_memory": Rule(
        _or_none(_wrong_limits),
        lambda: 'a mapping {device: size} such as {0: "8GB", "cpu": "60GiB"}, or None',
        _wrong_limits,
    ),
    "profile": Rule(
        lambda value: profile_problem(value) is None,
        lambda: '"auto", "off", the name of a workload ("auto:italian"), or the path of a profile',
        profile_problem,
        plain_profile,
    ),
    "policy": Rule(lambda value: isinstance(value, str) and value in POLICIES, lambda: _any_of(POLICIES)),
    "half_life": Rule(_is_positive, lambda: "tokens: a finite number above 0"),
    "experts_implementation": _choice("auto", "grouped_mm", "batched_mm"),
    "compile": _choice("auto", "inductor", "graph"),
    "compute": _choice("exact", "fast", "packed"),
    "decide": _choice("auto", "host", "device"),
    "overlap": _flag_or_none(),
    "lookahead": _flag(),
    "dynamic": _flag_or_none(),
    "wave_rows": Rule(
        lambda value: value == "auto" or (_is_int(value) and value >= 1),
        lambda: 'rows of scratch: "auto", or an integer of 1 or more',
    ),
    "kv_tokens": _at_least(0, "tokens of KV cache"),
    "kv_sequences": _at_least(1, "KV caches"),
    "reserve": Rule(
        _is_reserve, lambda: '"auto", bytes (0 for none), or a size such as "1GB" or "512MiB"', size_problem
    ),
    "offload_folder": _path("the path of a folder"),
    "lock_memory": Rule(lambda value: value == "auto" or isinstance(value, bool), lambda: 'True, False, or "auto"'),
    "rank_timeout": Rule(_is_positive, lambda: "seconds: a finite number above 0"),
    "untested": _flag(),
    "poison": _flag(),
    "prewarm": _flag(),
    "fullgraph": _flag(),
    "live": _flag(),
}
