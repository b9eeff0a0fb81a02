"""What torch may be asked in another way, with the same bits of a product: tried out once for each kind of product.

Shapes: M rows, I inputs, O outputs.

A matrix is packed as the file has it, rows of outputs. Whether the product with some of its rows has the bits of the
product with all of them, and the product with [O, I] seen from the side those of the product with a copy [I, O], is
up to the kernels that torch chooses: for the processor, the shape, and what a program may switch at any time.
"""

from __future__ import annotations

import sys
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
SMALLEST_DOUBLE = sys.float_info.min  # that is not denormal
FEW = 4  # M that are tried: decode and small batches. With more rows the kernels differ (measured with 8 to 32)


Run = tuple[int, int, int]  # a slot, and the token-expert pairs [begin, end) that are for the expert in it


class Order(NamedTuple):
    """How torch adds up a product of a few bfloat16 rows: see `compiled/in_order/sums.py`."""

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
    return _find_orders(outputs, inputs, turned, switches())[rows - 1]


@cache
def _find_orders(outputs: int, inputs: int, turned: bool, switches: Hashable) -> tuple[Order | None, ...]:
    """For each number of rows; a large matrix is made up once for all of them."""
    if multiplier() is None:
        return (None,) * FEW
    found = {rows: orders_of(inputs) for rows in range(1, FEW + 1)}
    for x_MI, matrix_OI in trials(FEW, outputs, inputs, torch.bfloat16):
        matrix_IO = matrix_OI.t().contiguous() if turned else matrix_OI.t()
        for rows, orders in found.items():
            if orders:
                expected = _multiply(x_MI[:rows], matrix_IO)
                found[rows] = [order for order in orders if repeats(expected, x_MI[:rows], matrix_OI, order)]
    return tuple(the_only(orders) for orders in found.values())


def orders_of(inputs: int) -> list[Order]:
    """Those of `ORDERS` that differ with so many inputs: more than all of them are no longer chunk."""
    return [order for order in ORDERS if order.chunk < 2 * inputs or order.chunk <= ORDERS[1].chunk]


def the_only(orders: list[Order]) -> Order | None:
    """What trials have left over. Where that is more than one, they have told nothing: weights may be all zero."""
    return orders[0] if len(orders) == 1 else None


def repeats(expected_MO: Tensor, x_MI: Tensor, matrix_OI: Tensor, order: Order, bias_O: Tensor | None = None) -> bool:
    """Whether a result is what that order gives, for a matrix (and a bias) whose first rows repeat, as in `trials`."""
    outputs = len(matrix_OI)
    few = min(outputs, DIFFERENT)
    out_MO = expected_MO.new_empty((len(x_MI), few))
    multiplier()(x_MI, matrix_OI[:few], out_MO, *order, None if bias_O is None else bias_O[:few])
    return same_bits(out_MO.repeat(1, -(-outputs // few))[:, :outputs], expected_MO)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two results are equal in every bit: 0 and -0 differ."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.view(integer), other.view(integer))


def multiplier() -> Any:
    """The kernel that adds up in an order that is asked for; None where numba or the processor has none."""
    kernels = load_dense_kernels()
    return None if kernels is None else kernels.multiply


@cache
def load_dense_kernels() -> Any:
    """The module of those kernels, or None."""
    try:
        from .compiled.in_order import dense
    except ImportError:  # as in formats.py
        return None
    return dense if dense.can_run() else None


def strips_are_exact(heights: tuple[int, ...], inputs: int, dtype: torch.dtype) -> bool:
    """Whether x [1, I] times strips of a matrix, of so many rows each, has the bits of x times the whole of it.

    The last strip counts as much as the others: a library may take another kernel for its few rows.
    """
    return _strips_are_exact(heights, inputs, dtype, switches())


def transposed_is_exact(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether x [M, I], of so many rows, times a matrix [O, I] seen as [I, O] has the bits of x times a copy [I, O]."""
    return rows <= FEW and _transposed_is_exact(rows, outputs, inputs, dtype, switches())


def switches() -> Hashable:
    """What torch chooses its kernels by that a program may switch between two calls, and whether this thread takes
    denormal numbers for zero: torch's others may not, and who computes which output decides then. Without oneDNN,
    kernels of bfloat16 sum in another order where the matrix is seen from the side (seen with 5760 x 2880)."""
    onednn, flushes = torch.backends.mkldnn, SMALLEST_DOUBLE / 2 == 0
    return torch.get_num_threads(), onednn.enabled, onednn.matmul.fp32_precision, flushes  # type: ignore[attr-defined]


@cache
def _strips_are_exact(heights: tuple[int, ...], inputs: int, dtype: torch.dtype, switches: Hashable) -> bool:
    for x_1I, matrix_OI in trials(1, sum(heights), inputs, dtype):
        out_1O, begin = x_1I.new_empty((1, len(matrix_OI))), 0
        for height in heights:
            end = begin + height
            torch.mm(x_1I, matrix_OI[begin:end].t(), out=out_1O[:, begin:end])
            begin = end
        if not same_bits(out_1O, _multiply(x_1I, matrix_OI.t())):
            return False
    return True


@cache
def _transposed_is_exact(rows: int, outputs: int, inputs: int, dtype: torch.dtype, switches: Hashable) -> bool:
    return all(
        same_bits(_multiply(x_MI, matrix_OI.t()), _multiply(x_MI, matrix_OI.t().contiguous()))
        for x_MI, matrix_OI in trials(rows, outputs, inputs, dtype)
    )


def _multiply(x_MI: Tensor, matrix_IO: Tensor) -> Tensor:
    """Into memory that is there, as products are computed: autocast would convert what torch.mm is to return."""
    return torch.mm(x_MI, matrix_IO, out=x_MI.new_empty((len(x_MI), matrix_IO.shape[1])))


def trials(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations [rows, I] and matrices [O, I] to try. The products of the first add up to zero, in pairs that lie
    apart: what is left is the rounding of the sum itself, which another order of summing changes nearly everywhere. In
    products of random numbers it changes one bfloat16 in ten thousand, and a trial would miss it. The products of the
    last, smaller from row to row, are at the edge of what float32 has: kernels differ in where they keep denormals."""
    # Whatever the default device.
    told: Any = {"generator": torch.Generator("cpu").manual_seed(outputs), "device": "cpu"}
    half = inputs // 2
    for cancels, size in ((True, 1.0), (False, 1.0), (False, EDGE)):
        x = torch.randn((rows, inputs), dtype=dtype, **told)
        matrix = torch.randn((min(outputs, DIFFERENT), inputs), dtype=dtype, **told)
        if cancels:
            first, second = torch.randperm(inputs, **told)[: 2 * half].view(2, half)
            x[:, second], matrix[:, second] = x[:, first], -matrix[:, first]
        if size == EDGE:
            matrix *= 2.0 ** -(torch.arange(len(matrix), device="cpu")[:, None] % TILE)
        yield x * size, (matrix * size).repeat(-(-outputs // len(matrix)), 1)[:outputs]
