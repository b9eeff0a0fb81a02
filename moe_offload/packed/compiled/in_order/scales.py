"""Scales of sixteen rows, turned, as `code_pairs.py` takes them: for each group, those of all rows side by side.

Shapes: G groups of one scale in a row. A weight that is denormal as float32, before it is rounded, would be zero to the
kernels, where unpacking may round it up to a number that is none: a matrix with scales so small is left alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..dot import MXFP4
from ..pool import array_at, compiled
from ..unpack import scale_at
from ..vectors import BFLOAT16, BYTES, FLOAT32, HALVES_16, I32, I64, WORDS, lanes, load, moved, store
from .code_pairs import EACH_TWICE, LINE, POWERS, each_twice
from .turning import ROWS, turn_words

SMALLEST = np.float32(2.0**-117)  # times the smallest code, 2^-9 in FP8, it is no denormal
SMALLEST_BITS, INFINITY_BITS = (127 - 117) << 23, 0x7F800000
FIRST_POWER, LAST_POWER = 2, 251  # of MXFP4: with these, no weight is denormal or infinite
TIMES = np.float32(2.0**100)  # how large or small a scale may be whose weights are made by adding to the exponent


@compiled
def widen_scales(form, kind, shared, scales, first, block_rows, groups, out):  # type: ignore[no-untyped-def]
    """Those of the sixteen rows from `first`, of which `block_rows` share one. Whether all are ones for the kernels."""
    wrong = 0
    if form == MXFP4:
        for group in range(0, groups, ROWS):
            wrong |= widen_powers(scales + first * groups, groups, min(group, groups - ROWS), out)
        return wrong == 0
    if shared:
        return _widen_shared(scales, kind, first // block_rows * groups, groups, out)
    if block_rows == 1 and groups >= ROWS and kind == FLOAT32:
        for group in range(0, groups, ROWS):
            wrong |= widen_floats(FLOAT32, scales + 4 * first * groups, 4 * groups, min(group, groups - ROWS), out)
        return wrong == 0
    if block_rows == 1 and groups >= ROWS and kind == BFLOAT16:
        for group in range(0, groups, ROWS):
            wrong |= widen_floats(BFLOAT16, scales + 2 * first * groups, 2 * groups, min(group, groups - ROWS), out)
        return wrong == 0
    return _widen_singly(scales, kind, first, block_rows, groups, out)


@compiled
def _widen_shared(scales, kind, begin, groups, out):  # type: ignore[no-untyped-def]
    out_G, right = array_at(out, (groups,), np.float32), True
    for group in range(groups):
        scale = scale_at(scales, kind, begin + group)
        right = right and 1 / TIMES <= abs(scale) <= TIMES
        out_G[group] = scale
    return right


@compiled
def _widen_singly(scales, kind, first, block_rows, groups, out):  # type: ignore[no-untyped-def]
    out_GR, right = array_at(out, (groups, ROWS, 2), np.float32), True
    for row in range(ROWS):
        begin = (first + row) // block_rows * groups
        for group in range(groups):
            scale = scale_at(scales, kind, begin + group)
            right = right and (scale == 0 or abs(scale) >= SMALLEST)
            out_GR[group, row, 0] = scale
            out_GR[group, row, 1] = scale
    return right


@intrinsic
def widen_powers(typingctx, scales, stride, first, out):  # type: ignore[no-untyped-def]
    """Of e8m0 scales of sixteen groups, from `first`, what is to be added to the exponents of two bfloat16 in a word.
    Returns what is not 0 if one is too small or large."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        scales, stride, first, out = args
        wrong, rows = lanes(WORDS, 0), []
        for row in range(ROWS):
            exponents = b.zext(load(b, BYTES, b.add(b.add(scales, first), b.mul(stride, I64(row)))), WORDS)
            beyond = b.icmp_unsigned(
                ">", b.sub(exponents, lanes(WORDS, FIRST_POWER)), lanes(WORDS, LAST_POWER - FIRST_POWER)
            )
            wrong = b.or_(wrong, b.zext(beyond, WORDS))
            power = b.and_(b.shl(b.sub(exponents, lanes(WORDS, 127)), lanes(WORDS, 7)), lanes(WORDS, 0xFFFF))
            rows.append(b.or_(power, b.shl(power, lanes(WORDS, 16))))
        for group, column in enumerate(turn_words(b, rows)):
            store(b, column, moved(b, out, b.add(first, I64(group)), POWERS))
        return _any_lane(b, wrong)

    return types.int64(types.int64, types.int64, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def widen_floats(typingctx, kind, scales, stride, first, out):  # type: ignore[no-untyped-def]
    """Scales of sixteen groups, from `first`, as float32, each row twice. Returns what is not 0 if one is too small, or
    no number."""
    constant = kind.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        scales, stride, first, out = args[1:]
        wrong, rows = lanes(WORDS, 0), []
        for row in range(ROWS):
            place = b.add(moved(b, scales, first, 4 if constant == FLOAT32 else 2), b.mul(stride, I64(row)))
            if constant == FLOAT32:
                bits = load(b, WORDS, place)
            else:
                bits = b.shl(b.zext(load(b, HALVES_16, place), WORDS), lanes(WORDS, 16))
            size = b.and_(bits, lanes(WORDS, 0x7FFFFFFF))
            beyond = b.icmp_unsigned(
                ">", b.sub(size, lanes(WORDS, SMALLEST_BITS)), lanes(WORDS, INFINITY_BITS - SMALLEST_BITS)
            )
            wrong = b.or_(wrong, b.zext(b.and_(beyond, b.icmp_unsigned("!=", size, lanes(WORDS, 0))), WORDS))
            rows.append(bits)
        for group, column in enumerate(turn_words(b, rows)):
            place = moved(b, out, b.add(first, I64(group)), EACH_TWICE)
            for half in (0, 1):
                store(b, each_twice(b, column, 8 * half), b.add(place, I64(LINE * half)))
        return _any_lane(b, wrong)

    return types.int64(kind, types.int64, types.int64, types.int64, types.int64), build


def _any_lane(b: Any, words: Any) -> Any:
    kind = ir.FunctionType(I32, [WORDS])
    return b.zext(b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.or.v16i32"), [words]), I64)
