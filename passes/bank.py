"""`Bank`: how a bank of rows is read as stacked weights inside a graph.

Shapes: S slots, N elements of one row.

A bank is `[S, N]` of one dtype; a weight is a range of columns, seen as `[S, *shape]`. Only views: nothing is copied.

    before   gate_up_proj [E, 2I, H]      down_proj [E, H, I]            two placeholders
    after    bank[:, 0:a].view(S, 2I, H)  bank[:, a:b].view(S, H, I)     one placeholder, retyped to the bank

A weight that lies packed in the rows is no view of them: what reads it is handed the bank itself (see `packed`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Graph, Node


class RowField(Protocol):
    """One weight's share of a row (bytes); `shape` is that of a single expert."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Bank:
    """`slots` rows, each laid out as `fields` say. `dtype` is that of the bank tensor: the weights' own where they
    share one, else bytes. `packed` are the weights that lie packed in a row, with the numbers that ops know them by."""

    fields: tuple[RowField, ...]
    slots: int
    dtype: torch.dtype
    packed: tuple[tuple[str, int], ...] = ()

    def views(self, bank_SN: Tensor) -> dict[str, Tensor]:
        """The stacked weights `{field: [S, *shape]}` of a bank tensor; of one that is packed, the bank."""
        return {field.name: self._view(bank_SN, field) for field in self.fields} | {
            name: bank_SN for name, _ in self.packed
        }

    def _view(self, bank_SN: Tensor, field: RowField) -> Tensor:
        start, stop = self._columns(field)
        part = bank_SN[:, start:stop]
        return (part if field.dtype == self.dtype else part.view(field.dtype)).view(bank_SN.shape[0], *field.shape)

    def view_nodes(self, graph: Graph, bank: Node, wanted: Iterable[str]) -> dict[str, Node]:
        """The same views as nodes, inserted at the graph's current insertion point."""
        nodes = {}
        for field in self.fields:
            if field.name in wanted:
                start, stop = self._columns(field)
                part = graph.call_function(operator.getitem, (bank, (slice(None), slice(start, stop))))
                if field.dtype != self.dtype:
                    part = graph.call_method("view", (part, field.dtype))
                nodes[field.name] = graph.call_method("view", (part, self.slots, *field.shape))
        return nodes

    def is_retyped(self, name: str) -> bool:
        """Whether a weight lies in the bank as elements of another type."""
        return any(field.name == name and field.dtype != self.dtype for field in self.fields)

    def picked_nodes(self, graph: Graph, bank: Node, name: str, slots_P: Node, pairs: int) -> Node:
        """`view[slots]` of such a weight, inserted at the graph's current insertion point. What is picked is re-typed,
        and not the view: a compiler may have to copy what is re-typed, and that would be all slots."""
        field = next(field for field in self.fields if field.name == name)
        start, stop = self._columns(field)
        part = graph.call_function(operator.getitem, (bank, (slice(None), slice(start, stop))))
        picked = graph.call_function(operator.getitem, (part, slots_P))
        retyped = graph.call_method("view", (picked, field.dtype))
        return graph.call_method("view", (retyped, pairs, *field.shape))

    def _columns(self, field: RowField) -> tuple[int, int]:
        size = self.dtype.itemsize
        return field.offset // size, (field.offset + field.nbytes) // size
