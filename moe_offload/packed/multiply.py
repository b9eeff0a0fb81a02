"""x @ W.T of a packed matrix, with the bits of the product of the whole one, and what may be done to it unnoticed.

For one token the matrix is unpacked in strips of rows that stay in the L2 cache, and each is multiplied while it is
there. Whether a product in strips has the bits of the whole one, or one by a transposed view those of one by a matrix
that lies the other way round, is a property of the library on this processor: it is tried, once for each shape, and
not done where a bit differs. What the library does depends on shapes and threads, never on the numbers.

Shapes: O outputs, I inputs, M tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import Format

STRIP = 1 << 19  # elements: a megabyte of bfloat16, half of a small L2 cache
ROWS = 64  # a strip is as many rows, or a multiple: the library's own blocks are not cut
TOKENS = (1, 2, 3, 4, 5, 8, 16, 17, 32, 64, 128)  # for which a transposed view is tried
TRIALS = 3

#: (what, O, I, dtype, threads, rows of a strip) -> whether the bits were the same.
_found: dict[tuple[object, ...], bool] = {}


def multiply_packed(format: Format, tensors: Sequence[Tensor], x_MI: Tensor, out_MO: Tensor, scratch: Tensor) -> None:
    """Write x @ W.T. `scratch` has the dtype of x and at least O * I elements, one after the other."""
    outputs, inputs = format.shape(tensors)
    scratch = scratch.view(-1)[: outputs * inputs].view(outputs, inputs)
    rows = strip_rows(format, inputs)
    if x_MI.shape[0] != 1 or rows >= outputs or not strips_are_exact(outputs, inputs, x_MI.dtype, rows, scratch):
        format.unpack(tensors, scratch)
        torch.mm(x_MI, scratch.t(), out=out_MO)
        return
    for begin in range(0, outputs, rows):
        end = min(begin + rows, outputs)
        strip = scratch[: end - begin]
        format.unpack(format.rows(tensors, begin, end), strip)
        torch.mm(x_MI, strip.t(), out=out_MO[:, begin:end])


def strip_rows(format: Format, inputs: int) -> int:
    """Rows of one strip: whole blocks of scales, and of the library's."""
    unit = math.lcm(ROWS, format.row_unit)
    return max(STRIP // inputs // unit, 1) * unit


def strips_are_exact(
    outputs: int, inputs: int, dtype: torch.dtype, rows: int, scratch_OI: Tensor | None = None
) -> bool:
    """Whether products of one token by strips of so many rows have the bits of the product by the whole matrix.

    `scratch_OI`, where it is given, is overwritten instead of memory being taken for a matrix.
    """
    key = ("strips", outputs, inputs, dtype, torch.get_num_threads(), rows)
    if key not in _found:
        weight_OI = _noise(torch.empty(outputs, inputs, dtype=dtype) if scratch_OI is None else scratch_OI)
        _found[key] = all(_strips_are_whole(weight_OI, rows, trial) for trial in range(TRIALS))
    return _found[key]


def transposed_is_exact(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether x @ W.t() by [O, I] in memory has the bits of x @ W by [I, O], for any number of `TOKENS`."""
    key = ("transposed", outputs, inputs, dtype, torch.get_num_threads())
    if key not in _found:
        weight_OI = _noise(torch.empty(outputs, inputs, dtype=dtype))
        weight_IO = weight_OI.t().contiguous()
        vectors = (_vector(tokens, inputs, dtype, tokens) for tokens in TOKENS)
        _found[key] = all(_same_bits(x_MI @ weight_OI.t(), x_MI @ weight_IO) for x_MI in vectors)
    return _found[key]


def _strips_are_whole(weight_OI: Tensor, rows: int, trial: int) -> bool:
    outputs, inputs = weight_OI.shape
    x_1I = _vector(1, inputs, weight_OI.dtype, trial)
    out_1O = torch.empty(1, outputs, dtype=weight_OI.dtype)
    for begin in range(0, outputs, rows):
        torch.mm(x_1I, weight_OI[begin : begin + rows].t(), out=out_1O[:, begin : begin + rows])
    return _same_bits(out_1O, torch.mm(x_1I, weight_OI.t()))


def _noise(matrix: Tensor) -> Tensor:
    """Numbers whose sums round otherwise in any other order: large and small ones, of both signs."""
    generator = torch.Generator(matrix.device).manual_seed(matrix.shape[0])
    return matrix.uniform_(-1, 1, generator=generator)


def _vector(tokens: int, inputs: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
