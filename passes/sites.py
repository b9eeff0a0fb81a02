"""What a search in a graph has found: which placeholders hold expert weights, who reads them, and by which ids.

Shapes: P token-expert pairs, E experts, T tokens, H hidden.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch.fx import Node


class UnknownUse(RuntimeError):
    """A graph uses an expert weight in a way no pattern knows."""

    def __init__(self, layer: Hashable, weight: str, use: str):
        super().__init__(f"{layer}: the graph uses {weight!r} in a way no pattern knows: {use}")
        self.layer = layer


@dataclass(frozen=True)
class Weight:
    """What a placeholder holds: the stacked parameter `field` of `layer`, `[num_experts, ...]`."""

    layer: Hashable
    field: str
    num_experts: int


@dataclass(frozen=True)
class WeightRead:
    """One reader of one weight.

    `node` reads; `ids` is where true expert ids enter (the index, or what is sorted). For the grouped form `sort` is
    the sort node and `offsets` the operand that ends each group. In the masked form there are no ids, and `ids` is the
    activation [E, T, H] whose zeros tell which tokens an expert did not get. `views` are the nodes that re-view the
    weight on its way to the reader, first to last.
    """

    node: Node
    ids: Node
    views: tuple[Node, ...] = ()
    sort: Node | None = None
    offsets: Node | None = None
    masked: bool = False

    @property
    def entry(self) -> Node:
        """The node through which the weight is reached: its first view, or the reader itself."""
        return self.views[0] if self.views else self.node


@dataclass
class Site:
    """All readers of one layer's weights that share one tensor of expert ids: one call of one experts module.

    Of a masked site `ids` is what its first reader multiplies (see `WeightRead`).
    """

    layer: Hashable
    num_experts: int
    ids: Node
    weights: dict[str, Node] = field(default_factory=dict)
    reads: list[WeightRead] = field(default_factory=list)

    @property
    def reads_weights(self) -> bool:
        """Whether the stacked weights are still read, that is, no pass has served this site yet."""
        weights = set(self.weights.values())
        return any(weights & set(read.entry.all_input_nodes) for read in self.reads)

    @property
    def grouped(self) -> bool:
        return any(read.offsets is not None for read in self.reads)

    @property
    def masked(self) -> bool:
        return any(read.masked for read in self.reads)

    @property
    def sort(self) -> Node | None:
        return next((read.sort for read in self.reads if read.sort is not None), None)

    @property
    def reader_ids(self) -> Node:
        """The ids as the readers see them: sorted, for the grouped form."""
        return self.ids if self.sort is None else _get_item(self.sort, 0)

    @property
    def order(self) -> Node | None:
        """The permutation that sorts the ids; None where they are not sorted."""
        return None if self.sort is None else _get_item(self.sort, 1)

    @property
    def bank(self) -> Node:
        """The placeholder through which the bank enters a rewritten graph: that of the first weight."""
        return next(iter(self.weights.values()))

    @property
    def pairs(self) -> int | None:
        """P if it is a constant of this graph, else None. A masked site has as many as there are rows that are not
        zero, which is seen as it runs."""
        if self.masked:
            return None
        ids = self.ids.meta.get("example_value")
        count = ids.numel() if isinstance(ids, torch.Tensor) else None
        return count if type(count) is int else None


def _get_item(pair: Node, index: int) -> Node:
    return next(user for user in pair.users if user.target is operator.getitem and user.args[1] == index)
