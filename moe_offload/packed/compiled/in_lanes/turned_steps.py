"""The sums of a product with a matrix [I, O] in four parts, as code that is generated.

Shapes: I inputs, O outputs; R rows of activations and C vectors of eight outputs of one tile.

Of a matrix whose outputs lie side by side torch adds the product of input i to part i % 4, and in the end the parts one
after the other (`gemm_notrans_` in ATen's cpublas). Here outputs lie in the lanes of a vector, and parts are summed by
themselves.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..vectors import F32, I64, load, moved, spread, store
from .steps import EIGHT, OUTPUTS, REGISTER, ROWS, VECTOR, multiply_add, widened


@intrinsic
def widen_block(typingctx, source, row_bytes, rows, out):  # type: ignore[no-untyped-def]
    """Of so many rows of a matrix, `row_bytes` apart, C vectors of eight bfloat16 as float32, side by side."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        source, row_bytes, rows, out = args
        with cgutils.for_range(b, rows) as loop:
            first, target = b.add(source, b.mul(loop.index, row_bytes)), moved(b, out, loop.index, OUTPUTS * VECTOR)
            for c in range(OUTPUTS):
                store(b, widened(b, b.add(first, I64(2 * REGISTER * c))), b.add(target, I64(VECTOR * c)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@intrinsic
def add_turned_tile(typingctx, x, w, steps, sums, row_bytes):  # type: ignore[no-untyped-def]
    """Add to the sums [R, C, 8] of one part the products of so many steps: x [steps, R], w [steps, C, 8], float32.

    Sums of a row lie side by side, and rows `row_bytes` apart.
    """

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, w, steps, sums, row_bytes = args
        places = [
            [b.add(sums, b.add(b.mul(row_bytes, I64(r)), I64(VECTOR * c))) for c in range(OUTPUTS)] for r in range(ROWS)
        ]
        totals = [[cgutils.alloca_once_value(b, load(b, EIGHT, place)) for place in row] for row in places]
        with cgutils.for_range(b, steps) as loop:
            here_x, here_w = moved(b, x, loop.index, 4 * ROWS), moved(b, w, loop.index, OUTPUTS * VECTOR)
            weights = [load(b, EIGHT, b.add(here_w, I64(VECTOR * c))) for c in range(OUTPUTS)]
            for r in range(ROWS):
                activation = _everywhere(b, b.add(here_x, I64(4 * r)))
                for c in range(OUTPUTS):
                    b.store(multiply_add(b, activation, weights[c], b.load(totals[r][c])), totals[r][c])
        for row, kept in zip(places, totals, strict=True):
            for place, total in zip(row, kept, strict=True):
                store(b, b.load(total), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic
def add_line(typingctx, x, w, vectors, sums):  # type: ignore[no-untyped-def]
    """Add one input times so many vectors of eight bfloat16 weights, side by side, to as many sums."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, w, vectors, sums = args
        activation = _everywhere(b, x)
        with cgutils.for_range(b, vectors) as loop:
            weight, place = widened(b, moved(b, w, loop.index, 2 * REGISTER)), moved(b, sums, loop.index, VECTOR)
            store(b, multiply_add(b, activation, weight, load(b, EIGHT, place)), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


def _everywhere(b: Any, address: Any) -> Any:
    """One float32 in all lanes."""
    return spread(b, EIGHT, load(b, F32, address))
