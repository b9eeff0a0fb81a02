"""What torch may be asked in another way, with the same bits of a product: tried out once for each kind of product.

Shapes: M rows, I inputs, O outputs.

A matrix is packed as the file has it, rows of outputs. Whether the product with some of its rows has the bits of the
product with all of them, and the product with [O, I] seen from the side those of the product with a copy [I, O], is
up to the kernels that torch chooses: for the processor, the shape, and what a program may switch at any time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

STRIP_BYTES = 1 << 20  # of an unpacked strip, which is to stay in a core's own cache beside the codes
#: Elements of a bfloat16 matrix from which on our kernel pays: a smaller one lies in a cache, and numba takes 100 MB.
LARGE = 1 << 20
STEP, TILE = 32, 16  # inputs and outputs that the kernels take at once
DIFFERENT = 64  # rows of a matrix that is tried; then they repeat
EDGE = 2.0**-64  # the product of two such numbers is 2^-128, and float32 is denormal below 2^-126
FEW = 4  # M that are tried: decode and small batches. With more rows the kernels differ (measured with 8 to 32)


class Order(NamedTuple):
    """How torch adds up a product of a few bfloat16 rows: see `compiled/in_order.py`."""

    paired: bool
    chunk: int


#: What oneDNN was seen to do with up to eight rows, by AMX and by AVX512-BF16, for I of 64 to 14336.
ORDERS = (Order(True, 32), Order(False, 512), Order(False, 1024))


def find_order(rows: int, outputs: int, inputs: int, dtype: torch.dtype, *, turned: bool) -> Order | None:
    """In which order torch adds up x [M, I] times a matrix [O, I] seen as [I, O], or, `turned`, times a copy [I, O].

    None where it is none of `ORDERS`, where no kernel of ours is at hand, or where the matrix is not one for it.
    """
    if dtype != torch.bfloat16 or rows > FEW or inputs % STEP or outputs < TILE:
        return None
    return _find_order(rows, outputs, inputs, turned, switches())


@cache
def _find_order(rows: int, outputs: int, inputs: int, turned: bool, switches: Hashable) -> Order | None:
    multiply = multiplier()
    if multiply is None:
        return None
    orders = list(ORDERS)
    for x_MI, matrix_OI in trials(rows, outputs, inputs, torch.bfloat16):
        expected, found = _multiply(x_MI, matrix_OI.t().contiguous() if turned else matrix_OI.t()), []
        out_MO = torch.empty_like(expected)
        for order in orders:
            multiply(x_MI, matrix_OI, out_MO, *order)
            if torch.equal(out_MO, expected):
                found.append(order)
        orders = found
    return orders[0] if orders else None


@cache
def multiplier() -> Any:
    """The kernel that adds up in an order that is asked for; None where numba or the processor has none."""
    try:
        from .compiled.in_order import can_run, multiply
    except ImportError:  # as in formats.py
        return None
    return multiply if can_run() else None


def strips_are_exact(heights: tuple[int, ...], inputs: int, dtype: torch.dtype) -> bool:
    """Whether x [1, I] times strips of a matrix, of so many rows each, has the bits of x times the whole of it.

    The last strip counts as much as the others: a library may take another kernel for its few rows.
    """
    return _strips_are_exact(heights, inputs, dtype, switches())


def transposed_is_exact(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether x [M, I], of so many rows, times a matrix [O, I] seen as [I, O] has the bits of x times a copy [I, O]."""
    return rows <= FEW and _transposed_is_exact(rows, outputs, inputs, dtype, switches())


def switches() -> Hashable:
    """What torch chooses its kernels by that a program may switch between two calls. Without oneDNN, those of bfloat16
    sum in another order where the matrix is seen from the side (seen with 5760 x 2880)."""
    onednn = torch.backends.mkldnn
    return torch.get_num_threads(), onednn.enabled, onednn.matmul.fp32_precision  # type: ignore[attr-defined]


@cache
def _strips_are_exact(heights: tuple[int, ...], inputs: int, dtype: torch.dtype, switches: Hashable) -> bool:
    for x_1I, matrix_OI in trials(1, sum(heights), inputs, dtype):
        out_1O, begin = torch.empty((1, len(matrix_OI)), dtype=dtype), 0
        for height in heights:
            end = begin + height
            torch.mm(x_1I, matrix_OI[begin:end].t(), out=out_1O[:, begin:end])
            begin = end
        if not torch.equal(out_1O, _multiply(x_1I, matrix_OI.t())):
            return False
    return True


@cache
def _transposed_is_exact(rows: int, outputs: int, inputs: int, dtype: torch.dtype, switches: Hashable) -> bool:
    return all(
        torch.equal(_multiply(x_MI, matrix_OI.t()), _multiply(x_MI, matrix_OI.t().contiguous()))
        for x_MI, matrix_OI in trials(rows, outputs, inputs, dtype)
    )


def _multiply(x_MI: Tensor, matrix_IO: Tensor) -> Tensor:
    """Into memory that is there, as products are computed: autocast would convert what torch.mm is to return."""
    return torch.mm(x_MI, matrix_IO, out=x_MI.new_empty((len(x_MI), matrix_IO.shape[1])))


def trials(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations [rows, I] and matrices [O, I] to try. The products of the first add up to zero, in pairs that lie
    apart: what is left is the rounding of the sum itself, which another order of summing changes nearly everywhere. In
    products of random numbers it changes one bfloat16 in ten thousand, and a trial would miss it. The products of the
    last are at the edge of what float32 has: kernels differ in whether they keep denormal numbers."""
    generator, half = torch.Generator().manual_seed(outputs), inputs // 2
    for cancels, size in ((True, 1.0), (False, 1.0), (False, EDGE)):
        x = torch.randn((rows, inputs), generator=generator, dtype=dtype)
        matrix = torch.randn((min(outputs, DIFFERENT), inputs), generator=generator, dtype=dtype)
        if cancels:
            first, second = torch.randperm(inputs, generator=generator)[: 2 * half].view(2, half)
            x[:, second], matrix[:, second] = x[:, first], -matrix[:, first]
        yield x * size, (matrix * size).repeat(-(-outputs // len(matrix)), 1)[:outputs]
