"""A budget becomes a plan: how many slots each layer gets. Pure arithmetic on byte counts.

    budget = dense weights + reserve (KV cache, workspace) + scratch rows for prefill waves + banks + unused
    floor  = the smallest budget that works: the same with the fewest slots that work in each layer (`MoELayer.floor`)

A plan is never over budget, and one more slot never fits. A larger budget never gives fewer slots where all rows have
one size; with rows of several sizes it never lowers the smallest share of a layer (property-tested). Sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.sizes import format_size
from ..errors import BudgetError

#: The workspace in the reserve is for tracing, activations, what the allocator holds, and compiled kernels (see
#: memory/process_memory.py). These grow with a model up to a point: a sixth of the budget, 400 MB at most.
WORKSPACE_SHARE = 6
WORKSPACE_LIMIT = 400 * 10**6
#: Of what a budget has beyond the first number, an eighth, the third at most, is for what the layers of a prompt leave
#: in the heap for one another (`runtime/layer.py`): measured, 95 MB with 512 tokens of Qwen3-30B-A3B.
HEAP_FROM, HEAP_SHARE, HEAP_LIMIT = 4 * 10**9, 8, 100 * 10**6
#: The parts of a budget, as people read them.
PARTS = {
    "dense_weights": "dense weights",
    "reserve": "reserve (KV cache, workspace)",
    "prefill_scratch": "scratch for prefill",
    "weight_unpacking": "unpacking of one weight",
    "expert_slots": "expert slots",
    "unused": "unused",
}


def workspace(budget: int) -> int:
    """Bytes of the reserve that are for no tensor that is known beforehand. They grow with the budget, more slowly."""
    for_heap = min(max(0, budget - HEAP_FROM) // HEAP_SHARE, HEAP_LIMIT)
    return min(budget // WORKSPACE_SHARE, WORKSPACE_LIMIT) + for_heap


@dataclass(frozen=True)
class LayerShape:
    """What the plan needs to know of one MoE layer."""

    num_experts: int
    least: int  # slots: the experts of one token, or a single one where they are called one by one
    row_bytes: int


@dataclass(frozen=True)
class Costs:
    """What stands in the budget besides the banks.

    `unpack_bytes` is what the largest weight that rests packed takes while it is unpacked. `reserve_bytes` None means
    KV cache, the scores of attention that is not fused, what the device's libraries and allocator hold, and a share of
    the budget.
    """

    dense_bytes: int
    kv_bytes: int = 0
    scores_bytes: int = 0
    library_bytes: int = 0
    scratch_bytes: int = 0
    unpack_bytes: int = 0
    reserve_bytes: int | None = None

    def reserve(self, budget: int) -> int:
        if self.reserve_bytes is not None:
            return self.reserve_bytes
        return self.kv_bytes + self.scores_bytes + self.library_bytes + workspace(budget)

    def heap_bytes(self, budget: int) -> int:
        """Of the reserve, what is for the memory that the layers of a prompt leave in the heap for one another: all
        that it may become, or nothing."""
        known = self.kv_bytes + self.scores_bytes + self.library_bytes
        return HEAP_LIMIT if self.reserve(budget) - known >= WORKSPACE_LIMIT + HEAP_LIMIT else 0

    def for_banks(self, budget: int) -> int:
        """What is left of `budget` for slots; negative when nothing is."""
        return budget - self.dense_bytes - self.scratch_bytes - self.unpack_bytes - self.reserve(budget)


@dataclass(frozen=True)
class Plan:
    """`slots[l]` slots for layer l. `print` it: it says what the budget is spent on."""

    budget_bytes: int
    layers: tuple[LayerShape, ...]
    costs: Costs
    slots: tuple[int, ...]

    @property
    def bank_bytes(self) -> int:
        return sum(s * layer.row_bytes for s, layer in zip(self.slots, self.layers, strict=True))

    @property
    def expert_bytes(self) -> int:
        """All experts of all layers."""
        return sum(layer.num_experts * layer.row_bytes for layer in self.layers)

    @property
    def unused_bytes(self) -> int:
        return self.costs.for_banks(self.budget_bytes) - self.bank_bytes

    @property
    def floor_bytes(self) -> int:
        return floor_budget(self.layers, self.costs)

    @property
    def residency(self) -> float:
        """Slots over experts, all layers together."""
        return sum(self.slots) / sum(layer.num_experts for layer in self.layers)

    def parts(self) -> dict[str, int]:
        """Bytes by part of the budget, under the names that JSON has; all of them together are the budget."""
        return {
            "dense_weights": self.costs.dense_bytes,
            "reserve": self.costs.reserve(self.budget_bytes),
            "prefill_scratch": self.costs.scratch_bytes,
            "weight_unpacking": self.costs.unpack_bytes,
            "expert_slots": self.bank_bytes,
            "unused": self.unused_bytes,
        }

    def rows(self) -> list[tuple[str, int]]:
        """The parts, in words for people; what only quantised weights need is left out where it is nothing."""
        return [(PARTS[name], size) for name, size in self.parts().items() if size or name != "weight_unpacking"]

    def __str__(self) -> str:
        few, many = min(self.slots), max(self.slots)
        slots = f"{few}" if few == many else f"{few} to {many}"
        experts = max(layer.num_experts for layer in self.layers)
        lines = [f"budget {format_size(self.budget_bytes)}, floor {format_size(self.floor_bytes)}"]
        lines += [f"  {name:<30}{format_size(size):>30}" for name, size in self.rows()]
        lines += [
            f"{len(self.layers)} MoE layers, {slots} of {experts} experts resident in each ({self.residency:.0%}), "
            f"{format_size(self.expert_bytes)} of experts in all, row "
            f"{format_size(max(r.row_bytes for r in self.layers))}"
        ]
        return "\n".join(lines)


def plan_slots(budget: int, layers: Sequence[LayerShape], costs: Costs) -> Plan:
    """Share `budget` bytes out evenly over the layers, at least the fewest each; what is left goes to single slots.

    Raises `BudgetError`, stating the floor and what makes it up, when those do not fit.
    """
    smallest = floor_budget(layers, costs)
    if budget < smallest:
        raise BudgetError(_below_floor(budget, smallest, layers, costs))
    left = costs.for_banks(budget)
    low, high = 0, max(layer.num_experts for layer in layers)
    while low < high:  # the largest even share that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _cost(layers, middle) <= left else (low, middle - 1)
    slots = [_share(layer, low) for layer in layers]
    left -= _cost(layers, low)
    while open_layers := [i for i, x in enumerate(layers) if slots[i] < x.num_experts and x.row_bytes <= left]:
        poorest = min(open_layers, key=lambda i: (slots[i], i))
        slots[poorest] += 1
        left -= layers[poorest].row_bytes
    return Plan(budget, tuple(layers), costs, tuple(slots))


def floor_budget(layers: Sequence[LayerShape], costs: Costs) -> int:
    """The smallest budget that holds the fewest slots that work in every layer."""
    return _smallest_budget(_cost(layers, 0), costs)


def budget_for(residency: float, layers: Sequence[LayerShape], costs: Costs) -> int:
    """The smallest budget that keeps at least this share of every layer's experts resident (never below the floor)."""
    even = max(math.ceil(residency * layer.num_experts) for layer in layers)
    return _smallest_budget(_cost(layers, even), costs)


def _smallest_budget(need: int, costs: Costs) -> int:
    low = costs.dense_bytes + costs.scratch_bytes + costs.unpack_bytes + need + costs.reserve(0)
    high = 2 * low + WORKSPACE_LIMIT + HEAP_LIMIT
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if costs.for_banks(middle) >= need else (middle + 1, high)
    return low


def _share(layer: LayerShape, even: int) -> int:
    return min(layer.num_experts, max(layer.least, even))


def _cost(layers: Sequence[LayerShape], even: int) -> int:
    return sum(_share(layer, even) * layer.row_bytes for layer in layers)


def _below_floor(budget: int, smallest: int, layers: Sequence[LayerShape], costs: Costs) -> str:
    experts = sum(min(layer.least, layer.num_experts) for layer in layers)
    return (
        f"budget {format_size(budget)} is below the floor of {format_size(smallest)} that this model needs: dense "
        f"weights {format_size(costs.dense_bytes)}, reserve for KV cache and workspace "
        f"{format_size(costs.reserve(smallest))}, scratch for prefill {format_size(costs.scratch_bytes)}, "
        f"{f'unpacking {format_size(costs.unpack_bytes)}, ' if costs.unpack_bytes else ''}and the "
        f"experts in use at once {format_size(_cost(layers, 0))} ({experts} rows in {len(layers)} layers). Use a "
        f"budget of at least {smallest} bytes, fewer kv_tokens (--context, MOE_OFFLOAD_KV_TOKENS), or a smaller dtype"
    )
