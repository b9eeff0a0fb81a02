"""Products straight from the codes, with the bits of unpacking a matrix to bfloat16 and multiplying it by torch.

A weight is made in a register as unpacking makes it (a code's value, times its scale, rounded to bfloat16), and added
up in torch's order (`in_order.py`), so that the matrix is never written. Shapes: M rows, I inputs, O outputs; G groups
of one scale in a row.

A weight that is denormal as float32, before it is rounded, would be zero here, where unpacking may round it up to a
number that is none: a matrix with scales so small is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .dot import FP8, INT4, MXFP4, fp8_value, int4_value, mxfp4_value
from .in_order import STEP, Sums, fetch, write_rounded
from .pool import array_at, compiled, kernel, run, share
from .turning import ROWS, turn_quads, turn_words
from .unpack import SCALES, scale_at
from .vectors import BYTES, FLOATS, I32, I64, WORDS, lanes, load, moved, round_up, store

QUAD = ir.VectorType(I32, 4)
CODE_BITS = {MXFP4: 4, FP8: 8, INT4: 4}
SMALLEST = np.float32(2.0**-117)  # times the smallest code, 2^-9 in FP8, it is no denormal
LINE = 64


@intrinsic(prefer_literal=True)
def add_up_packed_tile(  # type: ignore[no-untyped-def]
    typingctx, form, paired, tokens, codes, stride, ahead, scales, groups, group_steps, x, x_stride, chunk, out
):
    """Sixteen rows of codes at `codes`, `stride` bytes apart, times x in float32; those at `ahead` are fetched.

    `scales` [G, 16] in float32; a group is `group_steps` steps.
    """
    constants = form.literal_value, bool(paired.literal_value), tokens.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, stride, ahead, scales, groups, group_steps, x, x_stride, chunk, out = args[3:]
        form, paired, tokens = constants
        wide = "+avx512f" in str(context.codegen().magic_tuple())
        step_bytes = STEP * CODE_BITS[form] // 8
        sums = Sums(b, tokens, paired, x, x_stride)
        with cgutils.for_range(b, groups) as group:
            scale = load(b, FLOATS, moved(b, scales, group.index, 4 * ROWS))
            with cgutils.for_range(b, group_steps) as part:
                step = b.add(b.mul(group.index, group_steps), part.index)
                place = moved(b, codes, step, step_bytes)
                rows = [b.add(place, b.mul(stride, I64(row))) for row in range(ROWS)]
                _fetch_some(b, step, LINE // step_bytes, [b.add(row, b.sub(ahead, codes)) for row in rows])
                words: list[Any] = []
                for quad in range(step_bytes // 16):
                    words += turn_quads(b, [load(b, QUAD, b.add(row, I64(16 * quad))) for row in rows])
                weights = [weight for word in words for weight in _weights(b, form, word, scale, wide)]
                sums.add_step(step, chunk, list(zip(weights[::2], weights[1::2], strict=True)))
        sums.write(out, I64(4 * ROWS))
        return context.get_dummy_value()

    return types.void(form, paired, tokens, *[types.int64] * 10), build


def _fetch_some(b: Any, step: Any, steps: int, places: Sequence[Any]) -> None:
    """A line lasts for so many steps: in each of them, the lines of a part of the rows are fetched."""
    turn = b.srem(step, I64(steps))
    each = len(places) // steps
    for i in range(each):
        place = places[i]
        for other in range(1, steps):
            place = b.select(b.icmp_signed("==", turn, I64(other)), places[other * each + i], place)
        fetch(b, place)


def _weights(b: Any, form: int, word: Any, scale: Any, wide: bool) -> list[Any]:
    """The weights whose codes lie in a word of each row, lowest bits first."""
    bits = CODE_BITS[form]
    found = []
    for i in range(32 // bits):
        code = b.lshr(word, lanes(WORDS, bits * i))
        if form == MXFP4:  # exact in bfloat16: four significant bits, and a power of two
            found.append(b.fmul(mxfp4_value(b, code, wide), scale))
            continue
        value = int4_value(b, code, wide) if form == INT4 else fp8_value(b, b.and_(code, lanes(WORDS, 255)))
        found.append(b.bitcast(b.and_(round_up(b, b.fmul(value, scale)), lanes(WORDS, -0x10000)), FLOATS))
    return found


@intrinsic
def widen_exponents(typingctx, scales, stride, first, out):  # type: ignore[no-untyped-def]
    """Scales e8m0 of sixteen groups, from `first`, of sixteen rows as float32 [16 groups, 16 rows]. Returns how many
    rows have one that is denormal or no number."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        scales, stride, first, out = args
        wrong = lanes(WORDS, 0)
        rows = []
        for row in range(ROWS):
            exponents = b.zext(load(b, BYTES, b.add(b.add(scales, first), b.mul(stride, I64(row)))), WORDS)
            for value in (0, 255):
                wrong = b.or_(wrong, b.zext(b.icmp_unsigned("==", exponents, lanes(WORDS, value)), WORDS))
            rows.append(b.shl(exponents, lanes(WORDS, 23)))
        for group, column in enumerate(turn_words(b, rows)):
            store(b, column, b.add(out, b.mul(b.add(first, I64(group)), I64(4 * ROWS))))
        kind = ir.FunctionType(I32, [WORDS])
        return b.zext(
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.or.v16i32"), [wrong]), I64
        )

    return types.int64(types.int64, types.int64, types.int64, types.int64), build


@compiled
def widen_scales(scales, kind, first, block_rows, groups, out):  # type: ignore[no-untyped-def]
    """Scales of the sixteen rows from `first`, of which `block_rows` share one, as float32 [G, 16]. Whether all are
    zero or large enough."""
    out_G16, right = array_at(out, (groups, ROWS), np.float32), True
    for row in range(ROWS):
        begin = (first + row) // block_rows * groups
        for group in range(groups):
            scale = scale_at(scales, kind, begin + group)
            right = right and (scale == 0 or abs(scale) >= SMALLEST)
            out_G16[group, row] = scale
    return right


def multiply(
    form: int, tensors: Sequence[Tensor], grid: tuple[int, int], x_MI: Tensor, out_MO: Tensor, paired: bool, chunk: int
) -> bool:
    """Write x @ W.T. Scales lie in a grid of (rows, groups). False, and nothing of worth written, where a scale is
    too small. For what `takes` takes."""
    codes, scale = tensors
    (tokens, inputs), outputs = x_MI.shape, out_MO.shape[1]
    x_float, wrong = x_MI.float().contiguous(), torch.zeros(1, dtype=torch.int64)
    where = (codes.data_ptr(), scale.data_ptr(), x_float.data_ptr(), out_MO.data_ptr(), wrong.data_ptr())
    shape = (outputs, inputs, outputs // grid[0], grid[1], out_MO.stride(0), chunk // STEP)
    job = (*where, *shape)
    run(_multiplier(form, SCALES[scale.dtype], paired, tokens), -(-outputs // ROWS), job, outputs * inputs)
    return not wrong.item()


def takes(form: int, scale: Tensor, grid: tuple[int, int], outputs: int, inputs: int) -> bool:
    """Whether groups are whole steps, and the rows enough for a tile."""
    whole = inputs % (STEP * grid[1]) == 0 and outputs >= ROWS
    return whole and scale.dtype in SCALES and (form != MXFP4 or grid[1] >= ROWS)


@cache
def _multiplier(form: int, kind: int, paired: bool, tokens: int) -> Any:
    """Compiled for each number of rows: their sums are registers."""
    bits = CODE_BITS[form]

    @kernel
    def multiply_in_order(data):  # type: ignore[no-untyped-def]
        job, begin, end = share(data)
        codes, scales, x, out, outputs, inputs = job[0], job[1], job[2], job[3], job[5], job[6]
        block_rows, groups, out_stride, chunk = job[7], job[8], job[9], job[10]
        row, steps = inputs * bits // 8, inputs // STEP // groups
        sums, scales_G16 = np.empty((tokens, ROWS), np.float32), np.empty((groups, ROWS), np.float32)
        for tile in range(begin, end):
            o = min(ROWS * tile, outputs - ROWS)  # the last tile may overlap the one before it
            w, ahead, right = codes + o * row, codes + min(o + ROWS, outputs - ROWS) * row, True
            if form == MXFP4:
                for first in range(0, groups, ROWS):
                    at = min(first, groups - ROWS)
                    right = right and widen_exponents(scales + o * groups, groups, at, scales_G16.ctypes.data) == 0
            else:
                right = widen_scales(scales, kind, o, block_rows, groups, scales_G16.ctypes.data)
            if not right:
                array_at(job[4], (1,), np.int64)[0] = 1
            scale = scales_G16.ctypes.data
            add_up_packed_tile(
                form, paired, tokens, w, row, ahead, scale, groups, steps, x, 4 * inputs, chunk, sums.ctypes.data
            )
            write_rounded(sums, 0, out + 2 * o, out_stride)

    return multiply_in_order
