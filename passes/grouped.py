"""The products of a core on a CPU, `x[i] @ weight[slots[i]]`: one matrix product for each run of equal slots; and
`scatter_pairs`, which puts the results of a wave in their places.

Shapes: P pairs, S slots, M pairs of one run.

Each run is multiplied with exactly its M rows. Fewer shapes would mean fewer kernels for oneDNN to compile and keep,
and rows among more rows came out the same on one processor; on another (with AMX) they did not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Run = tuple[int, int, int]  # a slot, and the pairs [begin, end) that are for the expert in it


def find_runs(slots: Sequence[int]) -> Iterator[Run]:
    """Each run of equal slots."""
    begin = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[begin]:
            yield slots[begin], begin, end
            begin = end


def grouped_mm(x_PI: Tensor, weight_SIO: Tensor, slots_P: Tensor) -> Tensor:
    """`[P, O]`, what torch's own grouped_mm gives to the bit; but groups need not lie in slot order."""
    out_PO = x_PI.new_empty((x_PI.shape[0], weight_SIO.shape[2]))
    for slot, begin, end in find_runs(slots_P.tolist()):
        torch.mm(x_PI[begin:end], weight_SIO[slot], out=out_PO[begin:end])
    return out_PO


def scatter_pairs(part: Tensor, pairs: Tensor, like: Tensor) -> Tensor:
    """`part[i]` at position `pairs[i]` of a tensor as long as `like`, zeros elsewhere."""
    return part.new_zeros((like.shape[0], *part.shape[1:])).index_copy_(0, pairs, part)  # autocast leaves it alone
