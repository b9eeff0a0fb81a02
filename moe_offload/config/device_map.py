"""Where each layer computes and where its expert rows rest: accelerate's device_map grammar, with patterns.

    {"": 0, "model.layers.*.mlp.experts": "cpu"}     {"model.layers.3": "cpu"}     "auto"     "disk"

A key names a module (or, with * and ?, several); it covers everything inside; the longest matching key wins. For
experts "disk" (checkpoint files, or a spill file) and "cpu" (host RAM) say where their rows rest; an accelerator (0,
"cuda:0") says where the layer computes and its slots are, and its rows rest where "auto" puts them: in RAM as far as
max_memory["cpu"] has room, else on disk. An experts module that a key sends to "cpu" or "disk" computes where the
module around it is. Dense weights are always held where they compute: every token uses all of them.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import BudgetError, ConfigError, UnsupportedModelError
from .sizes import format_size, parse_size

DeviceMap = str | Mapping[str, str | int] | None
MaxMemory = Mapping[str | int, str | int] | None
TIERS = {"disk": "disk", "cpu": "host"}
ACCELERATORS = ("cuda", "xpu", "mps", "npu", "hpu", "mlu", "musa", "tpu")
AUTO = "auto"


@dataclass(frozen=True)
class Spot:
    """Where one experts module is: its slots on `device`, its rows in `tier` ("disk", "host", or "auto": not settled).

    `rule` says, for people, what decided.
    """

    device: str
    tier: str
    rule: str


def find_spots(
    names: Sequence[str], modules: Iterable[str], device_map: DeviceMap, devices: Sequence[str]
) -> list[Spot]:
    """Where `device_map` puts each experts module in `names`; `modules` are all module names of the model.

    `devices` are the accelerators that "auto" may use (those that max_memory names), in order.
    Raises `ConfigError` for a key that names no module and for a value that is no device.
    """
    rules = expand_map(device_map, names, devices)
    known = set(modules)
    for key, value in rules.items():
        if key and not any(_covers(key, module) for module in known):
            raise ConfigError(
                f"device_map key {key!r} names no module of the model; experts are in modules like {names[0]!r}"
            )
        device_name(key, value)
    found = []
    for name in names:
        key, value = find_longest_key(name, rules)
        rule = _shown(key, value, device_map)
        if str(value) in (*TIERS, AUTO):
            device = compute_device(name.rpartition(".")[0], rules)
            found.append(Spot(device, TIERS.get(str(value), AUTO), rule))
        else:
            found.append(Spot(device_name(key, value), AUTO, rule))
    return found


def expand_map(device_map: DeviceMap, names: Sequence[str], devices: Sequence[str]) -> dict[str, str | int]:
    """`device_map` as a mapping. "auto" over several accelerators gives each a run of consecutive layers."""
    if device_map is not None and device_map != AUTO:
        return dict(device_map) if isinstance(device_map, Mapping) else {"": device_map}
    if not devices:
        return {"": AUTO}
    share = -(-len(names) // len(devices))
    return {
        "": devices[0],
        **({} if len(devices) == 1 else {_layer(n): devices[i // share] for i, n in enumerate(names)}),
    }


def compute_device(module: str, rules: Mapping[str, str | int]) -> str:
    """The device that a module other than experts computes on; "cpu", "disk" and "auto" are all the CPU."""
    return device_name(*find_longest_key(module, rules))


def device_name(key: str, value: str | int) -> str:
    """`value` of a map as "cpu" or "cuda:0". Raises `ConfigError` when it is no device."""
    where = str(value)
    if where in (*TIERS, AUTO):
        return "cpu"
    kind, _, number = where.partition(":")
    if where.isdecimal() and not isinstance(value, bool):
        return f"cuda:{where}"
    if kind in ACCELERATORS and (number.isdecimal() or where == kind):
        return f"{kind}:{number or 0}"
    raise ConfigError(
        f"device_map sends {key or 'the whole model'!r} to {value!r}; known are 'cpu', 'disk', 'auto', and "
        "accelerators such as 0 or 'cuda:0'"
    )


def parse_limits(max_memory: Mapping[str | int, str | int] | None, available: int) -> dict[str, int]:
    """`max_memory` in bytes under the names of `device_name`; "80%" is of `available`, for the CPU only.

    Raises `ConfigError` for a size or a device that means nothing.
    """
    found = {}
    for device, size in (max_memory or {}).items():
        if str(device) == "disk":
            parse_size(size, total=2**40)  # a limit for the disk is not used; one that is no size is still refused
            continue
        name = "cpu" if str(device) == "cpu" else device_name("max_memory", device)
        found[name] = parse_size(size, total=available if name == "cpu" else None)
    return found


def settle_tiers(found: Sequence[Spot], needs_bytes: Sequence[int], room_bytes: int | None) -> list[Spot]:
    """Decide every "auto": RAM while there is room, first layers first, else disk.

    `needs_bytes[l]` is what layer l would take of RAM, 0 where all its rows have slots and none need rest anywhere
    else. `room_bytes` is what max_memory["cpu"] leaves, None without such a limit: then "auto" is disk. First layers
    first, because their experts are used the most evenly: a cache does least for them, so they miss most.
    Raises `BudgetError` when what a map sends to "cpu" does not fit.
    """
    fixed = sum(need for spot, need in zip(found, needs_bytes, strict=True) if spot.tier == "host")
    room = max(room_bytes or 0, 0)
    if room_bytes is not None and fixed > room:
        raise BudgetError(
            f"device_map sends {format_size(fixed)} of experts to 'cpu', and max_memory['cpu'] leaves "
            f"{format_size(room)} for them; raise it, or send some layers to 'disk'"
        )
    left, settled = room - fixed, []
    for spot, need in zip(found, needs_bytes, strict=True):
        if spot.tier != AUTO:
            settled.append(spot)
        elif need == 0:
            settled.append(replace(spot, tier="disk", rule=f"{spot.rule}; every row has a slot"))
        elif need <= left:
            left -= need
            settled.append(replace(spot, tier="host", rule=f"{spot.rule}; fits in what max_memory['cpu'] leaves"))
        else:
            why = "no max_memory['cpu'] gives it RAM" if room_bytes is None else "max_memory['cpu'] leaves no room"
            settled.append(replace(spot, tier="disk", rule=f"{spot.rule}; {why}"))
    return settled


def refuse_absent(devices: Iterable[str], present: Iterable[str]) -> None:
    """Raise `UnsupportedModelError` unless this version computes on all of `devices`."""
    for device in devices:
        if device.partition(":")[0] not in present:
            raise UnsupportedModelError(
                f"device_map or max_memory asks to compute on {device}, and this process computes on "
                f"{', '.join(present)} only; expert rows rest in 'cpu' (RAM) or on 'disk'. `moe-offload plan` and "
                "forecast() plan for other devices. No GPU has run this version yet; config={'untested': True} tries it"
            )


def find_longest_key(name: str, rules: Mapping[str, str | int]) -> tuple[str, str | int]:
    """The key and value that count for module `name`; without any, ("", "auto")."""
    keys = [key for key in rules if not key or _covers(key, name)]
    best = max(keys, key=lambda key: (key.count("."), len(key) - len([c for c in key if c in "*?"])), default="")
    return best, rules.get(best, AUTO)


def _covers(key: str, module: str) -> bool:
    parts, pattern = module.split("."), key.split(".")
    return len(parts) >= len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))


def _layer(name: str) -> str:
    """The decoder layer that an experts module is in: "model.layers.3" of "model.layers.3.mlp.experts"."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: numbered + 1])


def _shown(key: str, value: str | int, device_map: DeviceMap) -> str:
    if not isinstance(device_map, Mapping):
        return "default" if device_map is None else f"device_map {device_map!r}"
    return f"{json.dumps(key)}: {json.dumps(value)}" if key in device_map else "no key of device_map"
