"""The sums of a product in 64 lanes, as code that is generated.

Shapes: I inputs; R rows of activations and C outputs of one tile.

On a processor without AVX512 torch computes products of bfloat16 by loops of its own (`gemm_transa_` in ATen's
cpublas): for each element the product of input i is added to the sum of lane i % 64, eight registers of eight lanes,
and in the end registers and then lanes are folded in half until one number is left. Lanes know nothing of each other,
so they may be summed one register at a time, for twelve elements at once: each load then serves three or four products
where torch's serves one.

    fold   r0+r4 r1+r5 r2+r6 r3+r7    +2    +1    lane+4    lane+2    lane+1

A product of two bfloat16 is exact in float32; a fused addition rounds once, as torch's does.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..vectors import F32, I16, I32, I64, fetch, lanes, load, moved, store

LANES, REGISTER = 64, 8
REGISTERS = LANES // REGISTER
ROWS, OUTPUTS = 4, 3  # of a tile: twelve sums, three weights and an activation are the sixteen registers
VECTOR = 4 * REGISTER  # bytes
AHEAD_BYTES = 16384  # weights that are fetched before they are needed
EIGHT, HALVES_8, WORDS_8 = (ir.VectorType(kind, REGISTER) for kind in (F32, I16, I32))


@intrinsic
def widen_row(typingctx, source, steps, out, each, group):  # type: ignore[no-untyped-def]
    """So many steps of 64 bfloat16 as float32: register g of step t goes to `out` + t * `each` + g * `group`."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        source, steps, out, each, group = args
        with cgutils.for_range(b, steps) as loop:
            first, target = moved(b, source, loop.index, 2 * LANES), b.add(out, b.mul(loop.index, each))
            for g in range(REGISTERS):
                store(b, widened(b, b.add(first, I64(2 * REGISTER * g))), b.add(target, b.mul(group, I64(g))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic
def add_tile(typingctx, x, w, steps, sums, row_bytes):  # type: ignore[no-untyped-def]
    """Add to one register of the sums [R, C] the products of so many steps: x [steps, R, 8], w [steps, C, 8] float32.

    Sums of a row lie 64 floats apart, and rows `row_bytes`.
    """

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, w, steps, sums, row_bytes = args
        places = [
            [b.add(sums, b.add(b.mul(row_bytes, I64(r)), I64(4 * LANES * c))) for c in range(OUTPUTS)]
            for r in range(ROWS)
        ]
        totals = [[cgutils.alloca_once_value(b, load(b, EIGHT, place)) for place in row] for row in places]
        with cgutils.for_range(b, steps) as loop:
            here_x, here_w = moved(b, x, loop.index, ROWS * VECTOR), moved(b, w, loop.index, OUTPUTS * VECTOR)
            weights = [load(b, EIGHT, b.add(here_w, I64(VECTOR * c))) for c in range(OUTPUTS)]
            for r in range(ROWS):
                activation = load(b, EIGHT, b.add(here_x, I64(VECTOR * r)))
                for c in range(OUTPUTS):
                    b.store(multiply_add(b, activation, weights[c], b.load(totals[r][c])), totals[r][c])
        for row, kept in zip(places, totals, strict=True):
            for place, total in zip(row, kept, strict=True):
                store(b, b.load(total), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic
def dot(typingctx, x, w, steps):  # type: ignore[no-untyped-def]
    """The sum of x [I] float32 times w [I] bfloat16, of so many steps of 64."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, w, steps = args
        totals = [cgutils.alloca_once_value(b, lanes(EIGHT, 0.0)) for _ in range(REGISTERS)]
        with cgutils.for_range(b, steps) as loop:
            here_x, here_w = moved(b, x, loop.index, 4 * LANES), moved(b, w, loop.index, 2 * LANES)
            for line in range(0, 2 * LANES, 64):
                fetch(b, b.add(here_w, I64(AHEAD_BYTES + line)))
            for g, total in enumerate(totals):
                weight = widened(b, b.add(here_w, I64(2 * REGISTER * g)))
                activation = load(b, EIGHT, b.add(here_x, I64(VECTOR * g)))
                b.store(multiply_add(b, activation, weight, b.load(total)), total)
        return _fold(b, [b.load(total) for total in totals])

    return types.float32(*[types.int64] * 3), build


@intrinsic
def fold(typingctx, sums):  # type: ignore[no-untyped-def]
    """The sum of 64 lanes."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        return _fold(b, [load(b, EIGHT, b.add(args[0], I64(VECTOR * g))) for g in range(REGISTERS)])

    return types.float32(types.int64), build


def _fold(b: Any, registers: list[Any]) -> Any:
    while len(registers) > 1:
        half = len(registers) // 2
        registers = [b.fadd(one, other) for one, other in zip(registers[:half], registers[half:], strict=True)]
    [total] = registers
    for width in (4, 2, 1):
        low, high = (
            ir.Constant(ir.VectorType(I32, width), [ir.Constant(I32, i + first) for i in range(width)])
            for first in (0, width)
        )
        nothing = ir.Constant(total.type, ir.Undefined)
        total = b.fadd(b.shuffle_vector(total, nothing, low), b.shuffle_vector(total, nothing, high))
    return b.extract_element(total, I32(0))


def widened(b: Any, address: Any) -> Any:
    """Eight bfloat16 as float32."""
    return b.bitcast(b.shl(b.zext(load(b, HALVES_8, address), WORDS_8), lanes(WORDS_8, 16)), EIGHT)


def multiply_add(b: Any, left: Any, right: Any, total: Any) -> Any:
    kind = ir.FunctionType(EIGHT, [EIGHT] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v8f32"), [left, right, total])
