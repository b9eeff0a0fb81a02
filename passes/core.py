"""The part of a site that needs expert weights, cut out so that it can run for any subset of the pairs.

Shapes: P token-expert pairs, S slots, H hidden, I inner.

    core(x [P, ...], slots [P], bank [S, N], others)         -> y [P, H]
    core(x [P, ...], slots [R], bank [S, N], others, rows)   -> y [R, H]     the R pairs `rows` of one wave (a slice
                                                                             where they lie next to each other)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .bank import Bank


@dataclass
class Core:
    """The model's own experts code between routing and weighting, as a function of pairs, slots and weights.

    `whole` runs every pair, `part` the products of some (see `waves`); `run_whole` and `run_part` are what executes
    them, the graphs themselves or compiled forms. `fields` names the weights they take, in order; `scalars` are the
    positions among the others of tensors that stand for plain numbers. With `rows_alone` a pair's result does not
    depend on which other pairs run with it, so a wave runs `whole` on its own pairs. Layers whose cores have the same
    `key` can share one.
    """

    whole: GraphModule
    part: GraphModule
    grouped: bool
    fields: tuple[str, ...]
    scalars: tuple[int, ...]
    rows_alone: bool
    bank: Bank
    compiler: Callable[[GraphModule], Callable[..., Tensor]]
    run_whole: Callable[..., Tensor] = field(init=False)
    run_part: Callable[..., Tensor] = field(init=False)

    @property
    def key(self) -> tuple[Hashable, ...]:
        called = tuple(node.target for node in self.part.graph.nodes if node.op == "call_function")
        return (
            self.part.code,
            called,
            self.grouped,
            self.fields,
            self.scalars,
            self.rows_alone,
            self.bank.fields,
            self.bank.dtype,
            self.compiler,
        )

    def __call__(
        self, x_P: Tensor, slots: Tensor, bank_SN: Tensor, others: Sequence[Any], rows: Tensor | slice | None = None
    ) -> Tensor:
        """One result per pair, in their order; with `rows` (positions, each once), one per pair of `rows`.

        There is a slot for each result. `bank_SN` may have any number of slots, and must hold those.
        """
        views = self.bank.views(bank_SN)
        others = [other.item() if i in self.scalars else other for i, other in enumerate(others)]
        given = (*(views[name] for name in self.fields), *others)
        if rows is None:
            return self.run_whole(x_P, slots, None, *given)
        if isinstance(rows, slice):
            if self.rows_alone and self.grouped:
                return self.run_whole(x_P[rows], slots, None, *given)
            rows = torch.arange(rows.start, rows.stop, device=slots.device)
        count = len(rows)
        if count == 1 and not self.grouped:
            # A batched matmul of one takes another kernel, which rounds differently: never run a pair alone.
            rows, slots = rows.expand(2), slots.expand(2)
        if self.rows_alone:
            return self.run_whole(x_P[rows], slots, None, *given)[:count]
        slots_P = slots.new_zeros(len(x_P)).index_copy(0, rows, slots)
        return self.run_part(x_P, slots_P, rows, *given)[rows[:count]]
