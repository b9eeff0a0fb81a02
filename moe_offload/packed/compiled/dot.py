"""One row of a packed matrix times a few vectors, straight from the codes: products and sums in float32.

A step is 32 columns: two vectors of sixteen weights, with the sixteen elements of x that belong to each. Codes of four
bits come as low and high nibbles, so there x lies as the even and the odd columns of each step (`fused.py`). The sum of
a block of one scale is multiplied by it once. The sums stay in registers for the whole row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import BYTES, F32, FLOATS, I64, WORDS, lanes, load, load_scale, moved, spread, store

MXFP4, FP8, INT4 = range(3)
STEP_BYTES = {MXFP4: 16, FP8: 32, INT4: 16}
FUSED = ("contract",)  # a product and a sum may be one instruction
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


@intrinsic(prefer_literal=True)
def dot_row(typingctx, form, kind, tokens, codes, scales, blocks, steps, x, x_stride, sums):  # type: ignore[no-untyped-def]
    """Write sixteen partial sums for each token. `form`, `kind` (of a scale) and `tokens` are constants.

    `blocks` of `steps` steps each; `x_stride` is the bytes from token to token.
    """
    constants = form.literal_value, kind.literal_value, tokens.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, scales, blocks, steps, x, x_stride, sums = args[3:]
        form, kind, tokens = constants
        wide = "+avx512f" in str(context.codegen().magic_tuple())
        totals = [cgutils.alloca_once_value(b, lanes(FLOATS, 0.0)) for _ in range(tokens)]
        parts = [cgutils.alloca_once_value(b, lanes(FLOATS, 0.0)) for _ in range(tokens)]
        with cgutils.for_range(b, blocks) as block:
            for part in parts:
                b.store(lanes(FLOATS, 0.0), part)
            with cgutils.for_range(b, steps) as step:
                index = b.add(b.mul(block.index, steps), step.index)
                pair = _weights(b, form, moved(b, codes, index, STEP_BYTES[form]), wide)
                for token, part in enumerate(parts):
                    place = b.add(moved(b, x, index, 128), b.mul(x_stride, I64(token)))
                    for half, weight in enumerate(pair):
                        element = load(b, FLOATS, b.add(place, I64(64 * half)))
                        b.store(_multiply_add(b, weight, element, b.load(part)), part)
            scale = spread(b, FLOATS, load_scale(b, kind, scales, block.index))
            for total, part in zip(totals, parts, strict=True):
                b.store(_multiply_add(b, b.load(part), scale, b.load(total)), total)
        for token, total in enumerate(totals):
            store(b, b.load(total), b.add(sums, I64(64 * token)))

    return types.void(form, kind, tokens, *[types.int64] * 7), build


def _multiply_add(b: Any, left: Any, right: Any, total: Any) -> Any:
    return b.fadd(b.fmul(left, right, flags=FUSED), total, flags=FUSED)


def _weights(b: Any, form: int, address: Any, wide: bool) -> tuple[Any, Any]:
    """The two vectors of a step, without their scale."""
    if form == FP8:
        first, second = (load(b, BYTES, b.add(address, I64(half))) for half in (0, 16))
        return fp8_value(b, b.zext(first, WORDS)), fp8_value(b, b.zext(second, WORDS))
    code = b.zext(load(b, BYTES, address), WORDS)
    low, high = b.and_(code, lanes(WORDS, 15)), b.lshr(code, lanes(WORDS, 4))
    if form == INT4:
        return int4_value(b, low, wide), int4_value(b, high, wide)
    return mxfp4_value(b, low, wide), mxfp4_value(b, high, wide)


def fp8_value(b: Any, code: Any) -> Any:
    """Of codes as words."""
    magnitude = b.and_(code, lanes(WORDS, 0x7F))
    small = b.bitcast(b.fmul(b.sitofp(magnitude, FLOATS), lanes(FLOATS, 2.0**-9)), WORDS)
    normal = b.add(b.shl(magnitude, lanes(WORDS, 20)), lanes(WORDS, 120 << 23))
    bits = b.select(b.icmp_unsigned("<", magnitude, lanes(WORDS, 8)), small, normal)
    return b.bitcast(b.or_(bits, b.shl(b.and_(code, lanes(WORDS, 0x80)), lanes(WORDS, 24))), FLOATS)


def int4_value(b: Any, code: Any, wide: bool) -> Any:
    """Of codes in the lowest four bits."""
    if wide:
        return _look_up(b, code, range(-8, 8))
    return b.sitofp(b.sub(b.and_(code, lanes(WORDS, 15)), lanes(WORDS, 8)), FLOATS)


def mxfp4_value(b: Any, code: Any, wide: bool) -> Any:
    """Of codes in the lowest four bits. Magnitudes 2 to 7 have an exponent as float32 has it; 0 and 1 are halves."""
    if wide:
        return _look_up(b, code, VALUES)
    magnitude = b.and_(code, lanes(WORDS, 7))
    small = b.bitcast(b.fmul(b.sitofp(magnitude, FLOATS), lanes(FLOATS, 0.5)), WORDS)
    normal = b.add(b.shl(magnitude, lanes(WORDS, 22)), lanes(WORDS, 126 << 23))
    bits = b.select(b.icmp_unsigned("<", magnitude, lanes(WORDS, 2)), small, normal)
    return b.bitcast(b.or_(bits, b.shl(b.and_(code, lanes(WORDS, 8)), lanes(WORDS, 28))), FLOATS)


def _look_up(b: Any, code: Any, values: Iterable[float]) -> Any:
    """The instruction looks at the lowest four bits of an index."""
    table = ir.Constant(FLOATS, [ir.Constant(F32, float(value)) for value in values])
    kind = ir.FunctionType(FLOATS, [FLOATS, WORDS])
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.sf.512"), [table, code])
