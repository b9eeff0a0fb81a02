"""From a model, a device map and memory limits to a plan per device and a tier per layer.

    device_map  ->  where each layer computes           (config/device_map.py)
    budget, max_memory  ->  bytes per device  ->  slots   (budget.py)
    what max_memory["cpu"] leaves  ->  RAM or disk       (config/device_map.py)

On a CPU the slots and the rows that rest in RAM share one memory: `max_memory["cpu"]` is all of it, `budget` the part
the model computes in, and what is between the two is for rows that rest in RAM. With only one of them, all of it is the
budget and rows rest on disk: a slot in use beats a copy in waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config.device_map import Spot, compute_device, expand_map, find_spots, parse_limits, refuse_absent, settle_tiers
from ..config.launched import read_launched
from ..config.settings import OffloadConfig
from ..config.sizes import format_size, parse_size
from ..errors import BudgetError, ConfigError
from ..experts import MoELayer
from ..memory.devices import free_bytes
from ..memory.machine import Memory, main_memory
from .budget import Plan, plan_slots
from .weights import dense_bytes_on, layer_shapes, library_bytes, sum_costs

RAM_SHARE = "80%"  # of what is available, for rows below an accelerator where nothing else is said


@dataclass(frozen=True)
class Arrangement:
    """Where everything goes: `spots[l]` of MoE layer l, and the plan of each device, which has its layers' slots.

    `host_bytes` of rows rest in RAM; `host_room_bytes` is what was left for them (None: no limit was given).
    """

    names: tuple[str, ...]
    spots: tuple[Spot, ...]
    plans: dict[str, Plan]
    host_bytes: int
    host_room_bytes: int | None

    @property
    def tiers(self) -> list[str]:
        return [spot.tier for spot in self.spots]

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of every MoE layer, as the plans of their devices have them."""
        return _slots_per_layer(self.spots, self.plans)

    @property
    def device(self) -> str:
        """The one device there is. Raises `ConfigError` when there are several."""
        self.check_one_device()
        return next(iter(self.plans))

    @property
    def plan(self) -> Plan:
        """The plan of the one device there is. Raises `ConfigError` when there are several."""
        self.check_one_device()
        return next(iter(self.plans.values()))

    def check_one_device(self) -> None:
        """Raise `ConfigError` when the model is spread over several devices."""
        if len(self.plans) > 1:
            raise ConfigError(
                f"the model is spread over {', '.join(self.plans)}: each has a plan of its own; ask forecast(), or "
                "`moe-offload plan`"
            )

    def with_slots(self, slots: tuple[int, ...]) -> Arrangement:
        """The same, of one device, with another number of slots in its layers."""
        return replace(self, plans={self.device: replace(self.plan, slots=slots)})


def arrange_layers(
    model: Any, moe_layers: Sequence[MoELayer], settings: OffloadConfig, usable: Sequence[str] | None = None
) -> Arrangement:
    """Plan `model` (it may be on the meta device) for `settings`.

    `usable` are the device types there are to compute on; None plans for any. Raises `ConfigError` for what means
    nothing, `BudgetError` for what does not fit, `UnsupportedModelError` for a device that is not among them.
    """
    names = [moe.name for moe in moe_layers]
    available = memory_of_rank(moe_layers).free
    allowed = parse_limits(settings.max_memory, available)
    accelerators = [device for device in allowed if device != "cpu"]
    found = find_spots(names, [name for name, _ in model.named_modules()], settings.device_map, accelerators)
    rules = expand_map(settings.device_map, names, accelerators)
    dense = dense_bytes_on(model, moe_layers, lambda module: compute_device(module, rules))
    computing = sorted({spot.device for spot in found} | set(dense))
    if usable is not None:
        refuse_absent(computing, usable)
    with_experts = [device for device in computing if any(spot.device == device for spot in found)]
    for device in set(computing) - set(with_experts):  # no slots there, so no plan: only a limit to keep
        if dense[device] > allowed.get(device, dense[device]):
            raise BudgetError(
                f"device_map puts {format_size(dense[device])} of dense weights on {device}, and max_memory allows "
                f"{format_size(allowed[device])} there; raise it, or send fewer modules there"
            )
    plans = {}
    for device in with_experts:
        ours = [moe for moe, spot in zip(moe_layers, found, strict=True) if spot.device == device]
        whole = sum_costs(model, moe_layers, settings, device)
        share = replace(
            whole,
            dense_bytes=dense.get(device, 0),
            kv_bytes=whole.kv_bytes * len(ours) // len(moe_layers),
            library_bytes=library_bytes(len(ours), device),
        )
        free = available if device == "cpu" else free_bytes(device) if usable is not None else allowed.get(device)
        plans[device] = plan_slots(_budget(device, with_experts, settings, allowed, free), layer_shapes(ours), share)
    per_layer = _slots_per_layer(found, plans)
    room = _host_room(plans, dense, allowed)
    if room is None and usable is not None and "cpu" not in computing:  # an accelerator: RAM is the tier below it
        room = parse_size(RAM_SHARE, total=available)
    needs = [0 if n == moe.num_experts else moe.nbytes for moe, n in zip(moe_layers, per_layer, strict=True)]
    settled = settle_tiers(found, needs, room)
    host = sum(moe.nbytes for moe, spot in zip(moe_layers, settled, strict=True) if spot.tier == "host")
    return Arrangement(tuple(names), tuple(settled), plans, host, room)


def memory_of_rank(moe_layers: Sequence[MoELayer]) -> Memory:
    """The main memory that this process can have: an even part, where several on this machine share a model."""
    launched, memory = read_launched() if any(moe.share is not None for moe in moe_layers) else None, main_memory()
    if launched is None or launched.here == 1:
        return memory
    return Memory(memory.total // launched.here, memory.free // launched.here, f"a rank's even part of {memory.bound}")


def _slots_per_layer(spots: Sequence[Spot], plans: dict[str, Plan]) -> tuple[int, ...]:
    """A plan has the slots of the layers on its device, in order; deal them out over all layers."""
    slots = {device: iter(plan.slots) for device, plan in plans.items()}
    return tuple(next(slots[spot.device]) for spot in spots)


def _budget(
    device: str, devices: Sequence[str], settings: OffloadConfig, allowed: dict[str, int], free: int | None
) -> int:
    """`free` bytes of the device are what "80%" and "auto" are of; None where that is not known."""
    if settings.budget is not None:
        if len(devices) > 1:
            raise ConfigError(
                f"budget={settings.budget!r} does not say how to share it between {', '.join(devices)}; give each a "
                f"limit: max_memory={{{', '.join(f'{d!r}: ...' for d in devices)}}}"
            )
        budget = parse_size(settings.budget, total=free)
        if budget > allowed.get(device, budget):
            raise BudgetError(
                f"budget={settings.budget!r} is more than max_memory={settings.max_memory!r} allows on {device}; the "
                "budget is a part of it: lower the one or raise the other"
            )
        return budget
    if device in allowed:
        return allowed[device]
    if free is None:
        raise BudgetError(
            f"nothing says how much of {device} the model may hold; say budget=..., or max_memory={{{device!r}: '8GB'}}"
        )
    return parse_size("auto", total=free)


def _host_room(plans: dict[str, Plan], dense: dict[str, int], allowed: dict[str, int]) -> int | None:
    if "cpu" not in allowed:
        return None
    return allowed["cpu"] - (plans["cpu"].budget_bytes if "cpu" in plans else dense.get("cpu", 0))
