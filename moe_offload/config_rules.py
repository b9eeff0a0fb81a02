"""What each setting accepts: one rule a field of `OffloadConfig`, as a test and in words.

A value that is accepted is also brought into its plain form: a path becomes text, a device "0" the number 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import ConfigError
from .policies import POLICIES
from .sizes import parse_size


class Rule(NamedTuple):
    """What a field accepts: as a test, and in words."""

    holds: Callable[[Any], bool]
    accepted: Callable[[], str]


def plain(value: Any) -> Any:
    """`value` as JSON and YAML can hold it, with device numbers as numbers (JSON makes every key a string)."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_number(key): _number(item) for key, item in value.items()}
    return value


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


def _is_half_life(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and 0 < value < math.inf


def _is_reserve(value: Any) -> bool:
    try:
        return value == "auto" or reserve_bytes(value) >= 0
    except ConfigError:
        return False


def _is_size(value: Any) -> bool:
    try:
        return parse_size(value, total=2**40) >= 1
    except ConfigError:
        return False


def _is_map(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(
        (isinstance(key, str) or _is_int(key)) and holds(item) for key, item in value.items()
    )


def _is_device_map(value: Any) -> bool:
    # Which names and devices there are is for placement.py, which knows the model.
    one = value is None or (isinstance(value, str) and "{" not in value)  # else a mapping that could not be read
    return one or _is_map(value, lambda item: isinstance(item, str) or _is_int(item))


#: One rule a field. Functions, so that a policy added to the table later is accepted and named.
RULES: dict[str, Rule] = {
    "budget": Rule(
        lambda value: value is None or _is_size(value),
        lambda: 'bytes, a size such as "8GB" or "8GiB", "80%" of the memory available, "auto", or None',
    ),
    "device_map": Rule(_is_device_map, lambda: '"auto", "disk", "cpu", a mapping {module: device}, or None'),
    "max_memory": Rule(
        lambda value: value is None or _is_map(value, _is_size),
        lambda: 'a mapping {device: size} such as {0: "8GB", "cpu": "60GiB"}, or None',
    ),
    "profile": _path("the path of a profile"),
    "policy": Rule(lambda value: isinstance(value, str) and value in POLICIES, lambda: _any_of(POLICIES)),
    "half_life": Rule(_is_half_life, lambda: "tokens: a finite number above 0"),
    "experts_implementation": _choice("auto", "grouped_mm", "batched_mm"),
    "compile": _choice("auto", "inductor", "graph"),
    "decide": _choice("auto", "host", "device"),
    "overlap": _flag_or_none(),
    "lookahead": _flag(),
    "dynamic": _flag_or_none(),
    "wave_rows": Rule(
        lambda value: value == "auto" or (_is_int(value) and value >= 1),
        lambda: 'rows of scratch: "auto", or an integer of 1 or more',
    ),
    "kv_tokens": _at_least(0, "tokens of KV cache"),
    "reserve": Rule(_is_reserve, lambda: '"auto", bytes (0 for none), or a size such as "1GB" or "512MiB"'),
    "offload_folder": _path("the path of a folder"),
    "untested": _flag(),
    "poison": _flag(),
    "prewarm": _flag(),
    "fullgraph": _flag(),
    "live": _flag(),
}
