"""`Core`: the model's own experts code of one MoE layer, between routing and weighting, callable for any of its pairs.

The core is what the rewrites leave as it is: the products and activations of the pairs. `core_graph.py` finds it.

Shapes: P token-expert pairs, R of them in one wave, S slots, N elements of one row, H hidden.

    core(x_P, slots_P, bank_SN, others)            -> y [P, H]
    core(x_P, slots_R, bank_SN, others, pairs_R)   -> y [R, H]     the pairs at these positions (a slice where they lie
                                                                   next to each other)
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
    positions among the others of tensors that stand for plain numbers. With `pairs_independent` a pair's result does
    not depend on which other pairs run with it, so a wave runs `whole` on its own pairs. Layers whose cores have the
    same `key` can share one. An event of up to `few_pairs` is run by `run_few`, in all of its waves: the two with
    products that may round otherwise (see `fast`).
    """

    whole: GraphModule
    part: GraphModule
    grouped: bool
    fields: tuple[str, ...]
    scalars: tuple[int, ...]
    pairs_independent: bool
    bank: Bank
    compiler: Callable[[GraphModule], Callable[..., Tensor]]
    few_pairs: int = 0
    run_whole: Callable[..., Tensor] = field(init=False)
    run_part: Callable[..., Tensor] = field(init=False)
    run_few: tuple[Callable[..., Tensor], Callable[..., Tensor]] = field(init=False)

    @property
    def key(self) -> tuple[Hashable, ...]:
        called = tuple(node.target for node in self.part.graph.nodes if node.op == "call_function")
        return (
            self.part.code,
            called,
            self.grouped,
            self.fields,
            self.scalars,
            self.pairs_independent,
            self.bank.fields,
            self.bank.dtype,
            self.compiler,
            self.few_pairs,
        )

    def __call__(
        self,
        x_P: Tensor,
        slots_R: Tensor,
        bank_SN: Tensor,
        others: Sequence[Any],
        pairs_R: Tensor | slice | None = None,
    ) -> Tensor:
        """One result per pair, in their order; with `pairs_R` (positions, each once), one for each of those.

        There is a slot for each result. `bank_SN` may have any number of slots, and must hold those.
        """
        views = self.bank.views(bank_SN)
        others = [other.item() if i in self.scalars else other for i, other in enumerate(others)]
        weights = (*(views[name] for name in self.fields), *others)
        run_whole, run_part = self.run_few if len(x_P) <= self.few_pairs else (self.run_whole, self.run_part)
        if pairs_R is None:
            return run_whole(x_P, slots_R, None, *weights)
        if isinstance(pairs_R, slice):
            if self.pairs_independent and self.grouped:
                return run_whole(x_P[pairs_R], slots_R, None, *weights)
            pairs_R = torch.arange(pairs_R.start, pairs_R.stop, device=slots_R.device)
        count = len(pairs_R)
        if count == 1 and len(x_P) > 1 and not self.grouped:
            # A batched matmul of one takes another kernel, which rounds differently: no pair of several runs alone.
            pairs_R, slots_R = pairs_R.expand(2), slots_R.expand(2)
        if self.pairs_independent:
            return run_whole(x_P[pairs_R], slots_R, None, *weights)[:count]
        slots_P = slots_R.new_zeros(len(x_P)).index_copy(0, pairs_R, slots_R)
        return run_part(x_P, slots_P, pairs_R, *weights)[pairs_R[:count]]
