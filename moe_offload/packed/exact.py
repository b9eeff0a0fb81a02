"""What torch may be asked in another way, with the same bits of a product: tried out once for each kind of product.

Shapes: M rows, I inputs, O outputs.

A matrix is packed as the file has it, rows of outputs. Whether the product with some of its rows has the bits of the
product with all of them, and the product with [O, I] seen from the side those of the product with a copy [I, O], is
up to the kernels that torch chooses for the processor, the shape and the number of threads.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

STRIP_BYTES = 1 << 20  # of an unpacked strip, which is to stay in a core's own cache beside the codes
ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 32, 64, 128)  # M: decode, small batches, prompts


def strips_are_exact(heights: tuple[int, ...], inputs: int, dtype: torch.dtype) -> bool:
    """Whether x [1, I] times strips of a matrix, of so many rows each, has the bits of x times the whole of it.

    The last strip counts as much as the others: a library may take another kernel for its few rows.
    """
    return _strips_are_exact(heights, inputs, dtype, torch.get_num_threads())


def transposed_is_exact(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether x [M, I] times a matrix [O, I] seen as [I, O] has the bits of x times a copy [I, O]."""
    return _transposed_is_exact(outputs, inputs, dtype, torch.get_num_threads())


@cache
def _strips_are_exact(heights: tuple[int, ...], inputs: int, dtype: torch.dtype, threads: int) -> bool:
    matrix_OI, x_1I = _random(sum(heights), inputs, dtype), _random(1, inputs, dtype)
    out_1O, begin = torch.empty((1, len(matrix_OI)), dtype=dtype), 0
    for height in heights:
        end = begin + height
        torch.mm(x_1I, matrix_OI[begin:end].t(), out=out_1O[:, begin:end])
        begin = end
    return torch.equal(out_1O, torch.mm(x_1I, matrix_OI.t()))


@cache
def _transposed_is_exact(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> bool:
    matrix_OI = _random(outputs, inputs, dtype)
    copy_IO = matrix_OI.t().contiguous()
    tried = (_random(rows, inputs, dtype) for rows in ROWS)
    return all(torch.equal(torch.mm(x_MI, matrix_OI.t()), torch.mm(x_MI, copy_IO)) for x_MI in tried)


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn((rows, columns), generator=generator).to(dtype)
