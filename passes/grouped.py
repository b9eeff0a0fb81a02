"""`x[i] @ weight[slots[i]]` on a CPU: one matrix product per run of equal slots, with a bound on the kernels it takes.

Shapes: P pairs, S slots, M pairs of one run.

For bfloat16, oneDNN compiles a kernel for every number of rows it meets and keeps up to 1024 of them, 0.65 MB each
(measured, torch 2.13): each prompt routes other numbers of pairs to the experts, and the process grows by hundreds of
MB that no budget knows of. So a run of M rows is computed as a few rows more, at most an eighth, and what is too much
is dropped: some 8 kernels per power of two instead of one per number. That is exact as long as a row's result does not
depend on how many rows there are. It does not here, and that is tried, in this process and for each shape of weight,
before anything relies on it (float32 goes to another library, whose results do depend on it, and is left alone).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FEW = 8  # rows that are never rounded
TRIED = (FEW + 1, 41, 77)


def grouped_mm(x_PI: Tensor, weight_SIO: Tensor, slots_P: Tensor) -> Tensor:
    """`[P, O]`, what torch's own grouped_mm gives to the bit; but groups need not lie in slot order."""
    out_PO = x_PI.new_empty((x_PI.shape[0], weight_SIO.shape[2]))
    rounds = x_PI.dtype == torch.bfloat16 and rows_are_independent(
        tuple(weight_SIO.shape[1:]), tuple(weight_SIO.stride()[1:]), torch.get_num_threads()
    )
    slots = slots_P.tolist()
    begin = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[begin]:
            weight_IO = weight_SIO[slots[begin]]
            more = rounded(end - begin) if rounds else end - begin
            if more == end - begin:
                torch.mm(x_PI[begin:end], weight_IO, out=out_PO[begin:end])
            else:
                window, skip = _window(x_PI, begin, end, more)
                out_PO[begin:end] = torch.mm(window, weight_IO)[skip : skip + end - begin]
            begin = end
    return out_PO


def rounded(rows: int) -> int:
    """The number of rows that is computed for a run of `rows`: a multiple of 8, or of an eighth of a power of two."""
    if rows <= FEW:
        return rows
    step = max(FEW, 1 << (rows.bit_length() - 4))
    return -(-rows // step) * step


def _window(x_PI: Tensor, begin: int, end: int, rows: int) -> tuple[Tensor, int]:
    """`rows` rows that hold those from `begin` to `end`, and where these begin in it."""
    if rows > len(x_PI):
        padded = x_PI.new_zeros((rows, x_PI.shape[1]))
        padded[: end - begin] = x_PI[begin:end]
        return padded, 0
    first = min(begin, len(x_PI) - rows)
    return x_PI[first : first + rows], begin - first


@functools.lru_cache(maxsize=256)
def rows_are_independent(shape: tuple[int, int], stride: tuple[int, int], threads: int) -> bool:
    """Whether, for bfloat16 weights of this shape, rows come out the same among more rows, wherever they stand."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty_strided(shape, stride, dtype=torch.bfloat16)
    weight.copy_(torch.randn(shape, generator=generator))
    most = rounded(max(TRIED))
    x = torch.randn((most, shape[0]), generator=generator).bfloat16()
    for rows in TRIED:
        for first in (0, rounded(rows) - rows):
            alone = torch.mm(x[first : first + rows], weight)
            if not torch.equal(alone, torch.mm(x[: rounded(rows)], weight)[first : first + rows]):
                return False
    return True
