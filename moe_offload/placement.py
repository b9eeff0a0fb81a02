"""Which tier each layer's experts rest in: accelerate's device_map grammar, with patterns.

    {"": "cpu", "model.layers.*.mlp.experts": "disk"}     {"model.layers.3": "cpu"}     "auto"     "disk"

A key names a module (or, with * and ?, several); it covers everything inside; the longest matching key wins. For
experts the value says where their rows rest: "disk" (checkpoint files, or a spill file), "cpu" (host RAM). Dense
weights stay where they are: this version computes on the CPU, so that is the only device a map may give them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from .errors import ConfigError, UnsupportedModelError
from .sizes import parse_size

DeviceMap = str | Mapping[str, str | int] | None
TIERS = {"disk": "disk", "cpu": "host"}
ACCELERATORS = ("cuda", "xpu", "mps", "npu", "hpu", "mlu", "musa", "tpu")


def place(names: Sequence[str], modules: Iterable[str], device_map: DeviceMap) -> list[str]:
    """The tier ("disk" or "host") of each experts module in `names`; `modules` are all module names of the model.

    Raises `ConfigError` for a key that names no module and for a value this version cannot serve.
    """
    if device_map is None or device_map == "auto":
        return ["disk"] * len(names)
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    known = set(modules)
    for key, value in device_map.items():
        if key and not any(_covers(key, module) for module in known):
            raise ConfigError(
                f"device_map key {key!r} names no module of the model; experts are in modules like {names[0]!r}"
            )
        _tier(key, value)
    return [_tier(*_longest(name, device_map)) for name in names]


def budget_from(max_memory: Mapping[str | int, str | int] | None) -> str | int | None:
    """The budget that an accelerate-style `max_memory` gives the device we compute on."""
    if max_memory is None:
        return None
    for device, size in max_memory.items():
        parse_size(size, total=2**40)  # a size that means nothing is refused even for a device we ignore
        if device not in ("cpu", "disk"):
            raise UnsupportedModelError(
                f"max_memory names device {device!r}; this version computes on the CPU: use max_memory={{'cpu': ...}} "
                f"or budget="
            )
    return max_memory.get("cpu")


def _covers(key: str, module: str) -> bool:
    parts, pattern = module.split("."), key.split(".")
    return len(parts) >= len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))


def _longest(name: str, device_map: Mapping[str, str | int]) -> tuple[str, str | int]:
    keys = [key for key in device_map if not key or _covers(key, name)]
    best = max(keys, key=lambda key: (key.count("."), len(key) - len([c for c in key if c in "*?"])), default="")
    return best, device_map.get(best, "disk")


def _tier(key: str, value: str | int) -> str:
    where = str(value)
    if where == "auto":
        return "disk"
    if where not in TIERS and not where.isdigit() and where.partition(":")[0] not in ACCELERATORS:
        raise ConfigError(
            f"device_map sends {key or 'the whole model'!r} to {value!r}; known are 'cpu', 'disk' and 'auto'"
        )
    if where not in TIERS:
        raise UnsupportedModelError(
            f"device_map sends {key or 'the whole model'!r} to {value!r}; this version computes on the CPU and keeps "
            "expert rows in 'cpu' (RAM) or on 'disk'"
        )
    return TIERS[where]
