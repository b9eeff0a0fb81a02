"""A masked site at run time: which rows of its input are not zero, and the experts code for those alone.

Shapes: E experts, T tokens, H hidden, N outputs, P rows of [E*T] that are not zero, U experts of one wave.

Such a model hands every token to every expert, multiplied by zero where the router did not choose the expert. An
expert's product with a row of zeros is a row of zeros (see `masked` for what that takes), so a row that is zero need
not be computed, and an expert all of whose rows are zero need not be there. A row that is NaN is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Experts that are multiplied at once: their matrices are copied next to each other, and one alone is another kernel.
AT_ONCE = 2


def stream_rows(
    x_ETH: Tensor, outputs: int, dtype: torch.dtype, core: Callable[..., Tensor], stream: Callable[..., Tensor]
) -> Tensor:
    """`[E, T, N]`: what `stream` computes for the rows that are not zero, zeros elsewhere.

    Each such row is one token-expert pair of the event that `stream` hears of.
    """
    num_experts, tokens = x_ETH.shape[:2]
    out_ETN = torch.zeros((num_experts, tokens, outputs), dtype=dtype, device=x_ETH.device)
    rows_P = find_rows(x_ETH)
    if len(rows_P):
        rows = MaskedCore(core, rows_P, tokens)
        out_ETN.flatten(0, 1).index_copy_(0, rows_P, stream(x_ETH, rows_P // tokens, rows, []))
    return out_ETN


def find_rows(x_ETH: Tensor) -> Tensor:
    """The positions in [E*T] of the rows that are not zero, those of each expert next to each other."""
    return (x_ETH != 0).any(-1).flatten().nonzero().flatten()


class MaskedCore:
    """`core`, which computes whole experts [T, H], as experts code for single rows: one result for each of `rows_P`."""

    def __init__(self, core: Callable[..., Tensor], rows_P: Tensor, tokens: int):
        self.core, self.rows_P, self.tokens = core, rows_P, tokens

    def __call__(
        self,
        x_ETH: Tensor,
        slots_R: Tensor,
        bank_SN: Tensor,
        others: Sequence[Any],
        pairs_R: Tensor | slice | None = None,
    ) -> Tensor:
        rows_R = self.rows_P if pairs_R is None else self.rows_P[pairs_R]
        experts_U, where_R = (rows_R // self.tokens).unique(return_inverse=True)
        slots_U = slots_R.new_empty(len(experts_U)).index_copy_(0, where_R, slots_R)
        parts = [
            self.core(x_ETH, slots, bank_SN, others, experts)
            for experts, slots in zip(experts_U.split(AT_ONCE), slots_U.split(AT_ONCE), strict=True)
        ]
        return torch.cat(parts).flatten(0, 1)[where_R * self.tokens + rows_R % self.tokens]
