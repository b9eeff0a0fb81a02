"""transformers' own experts code on the rows of a bank: what the op of last resort computes with.

Shapes: P token-expert pairs, R of them in one wave, S slots, N elements of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..experts import MoELayer
from ..forward.changed_parts import refuse_changed_parts
from ..memory.buffers import page_aligned


class ModuleCore:
    """transformers' own experts code, run for single pairs (K = 1) on the rows of a bank.

    Routing weights of one leave the pairs unweighted: the weighted sum over K is taken after all waves.
    """

    def __init__(self, moe: MoELayer, implementation: str, views: Callable[[Tensor], dict[str, Tensor]]):
        self.moe, self.module, self.views = moe, moe.modules[0], views
        self.run, self.grouped = original_code(implementation), implementation == "grouped_mm"

    def __call__(
        self,
        x_P: Tensor,
        slots_R: Tensor,
        bank_SN: Tensor,
        others: Sequence[Tensor],
        pairs_R: Tensor | slice | None = None,
    ) -> Tensor:
        # A batched product of one pair rounds otherwise than that of many, among which it is in the whole call.
        least = 1 if self.grouped else min(len(x_P), 2)
        if pairs_R is not None:
            x_P = x_P[pairs_R]
        refuse_changed_parts(self.module)
        if self.moe.packed:
            return self._run_unpacked(x_P, slots_R, bank_SN, least)
        return self._run_many(x_P, slots_R, self.views(bank_SN), least)

    def _run_many(self, x_P: Tensor, slots_P: Tensor, weights: dict[str, Tensor], least: int) -> Tensor:
        """Of `least` pairs or more; where there are fewer, one of them more often."""
        pairs = len(x_P)
        if 0 < pairs < least:
            x_P, slots_P = x_P.repeat(least, 1), slots_P.repeat(least)
        return self._run(x_P, slots_P, weights)[:pairs]

    def _run(self, x_P: Tensor, slots_P: Tensor, weights: dict[str, Tensor]) -> Tensor:
        bare = object.__new__(type(self.module))
        bare.__dict__.update(self.module.__dict__)
        bare.__dict__["_parameters"] = {**self.module._parameters, **weights}
        first = next(iter(weights.values()))
        bare.__dict__["num_experts"] = first.shape[0]
        ones = torch.ones((len(x_P), 1), dtype=first.dtype, device=x_P.device)
        out: Tensor = self.run(bare, x_P.to(first.dtype), slots_P.view(-1, 1), ones)
        return out

    def _run_unpacked(self, x_P: Tensor, slots_P: Tensor, bank_SN: Tensor, least: int) -> Tensor:
        """One expert after the other, so that one is unpacked at a time."""
        out_P: Tensor | None = None
        row = page_aligned(self.moe.unpacked.row_bytes)
        for slot in slots_P.unique().tolist():
            pairs = (slots_P == slot).nonzero().flatten()
            self.moe.unpack_row(bank_SN[slot].view(torch.uint8), row)
            weights = {field.name: field.view_in(row)[None] for field in self.moe.unpacked.fields}
            part = self._run_many(x_P[pairs], torch.zeros_like(pairs), weights, least)
            out_P = part.new_empty((len(x_P), *part.shape[1:])) if out_P is None else out_P
            out_P.index_copy_(0, pairs, part)
        if out_P is None:
            raise AssertionError(f"{self.moe.name}: no pair to compute")
        return out_P


def original_code(implementation: str) -> Callable[..., Tensor]:
    """transformers' own experts code of that name: (module, x [T, H], ids [T, K], weights [T, K]) -> [T, H]."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    code: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS[implementation]
    return code
