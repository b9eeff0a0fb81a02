"""Products of a few bfloat16 rows that are added up in torch's order (`sums.py`): the same bits, at memory's speed.

Shapes: M rows of activations, or P token-expert pairs; I inputs, O outputs, S slots.

What rounds to bfloat16 makes zeros of denormal numbers, as VCVTNEPS2BF16 does in Intel's manual.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as ll
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..pool import array_at, compiled, kernel, run, share
from ..vectors import I64, WORDS, fetch, load, moved
from .sums import STEP, Sums, at_end_of_chunk, denormals_flushed
from .turning import ROWS, turn_words


@intrinsic(prefer_literal=True)
def add_up_tile(typingctx, paired, tokens, w, stride, ahead, x, x_stride, steps, chunk, out, out_stride):  # type: ignore[no-untyped-def]
    """Sixteen rows of bfloat16 at `w`, `stride` bytes apart, times x; those at `ahead` are fetched."""
    constants = bool(paired.literal_value), tokens.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        w, stride, ahead, x, x_stride, steps, chunk, out, out_stride = args[2:]
        paired, tokens = constants
        with denormals_flushed(b, paired):
            sums = Sums(b, tokens, paired, x, x_stride)
            with cgutils.for_range(b, steps) as loop:
                places = [b.add(moved(b, w, loop.index, 2 * STEP), b.mul(stride, I64(row))) for row in range(ROWS)]
                words = [load(b, WORDS, place) for place in places]
                for place in places:
                    fetch(b, b.add(place, b.sub(ahead, w)))
                sums.add_step(loop.index, turn_words(b, words))
                with at_end_of_chunk(b, loop.index, chunk, steps):
                    sums.close_chunk()
            sums.write(out, out_stride)
        return context.get_dummy_value()

    return types.void(paired, tokens, *[types.int64] * 9), build


@compiled
def rounded(number):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 that is nearest to a float32, the even one of two; of a denormal number, of zero."""
    bits = np.float32(number).view(np.uint32)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))  # NaN: rounded, it could be infinity, or zero
    if bits & np.uint32(0x7F800000) == np.uint32(0):
        return np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def write_rounded(sums, bias, out, stride):  # type: ignore[no-untyped-def]
    """Sums [M, 16], and the bias [16] at that address if it is not 0, as bfloat16; rows are `stride` elements apart."""
    for token in range(len(sums)):
        out_16 = array_at(out + 2 * token * stride, (ROWS,), np.uint16)
        for lane in range(ROWS):
            total = sums[token, lane]
            if bias != 0:
                bits = array_at(bias, (ROWS,), np.uint16)[lane]
                total += np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
            out_16[lane] = rounded(total)


def can_run() -> bool:
    """Whether this processor is of the kind that those orders belong to, and has the instructions used here."""
    features = ll.get_host_cpu_features() if platform.machine().lower() in ("x86_64", "amd64") else {}
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512bf16"))


class Product(NamedTuple):
    """Addresses of one product: the activations `as_activations` has made, the matrix, the bias (or 0), the result."""

    x: int
    weight: int
    bias: int
    out: int


def as_activations(x_MI: Tensor, paired: bool) -> Tensor:
    """What kernels read: rows side by side, in float32 for sums in pairs."""
    return x_MI.float().contiguous() if paired else x_MI.resolve_neg().contiguous()


def multiply(
    x_MI: Tensor, weight_OI: Tensor, out_MO: Tensor, paired: bool, chunk: int, bias_O: Tensor | None = None
) -> None:
    """Write x @ W.T in that order of sums, and the bias added last. All bfloat16; `weight_OI` in one piece, as the
    bias; the outputs of a row side by side."""
    x, bias = as_activations(x_MI, paired), 0 if bias_O is None else bias_O.data_ptr()
    product = Product(x.data_ptr(), weight_OI.data_ptr(), bias, out_MO.data_ptr())
    multiply_each([product], (len(x_MI), *weight_OI.shape), out_MO.stride(0), paired, chunk)


def multiply_runs(
    x_PI: Tensor, weight_SOI: Tensor, runs: Sequence[tuple[int, int, int]], out_PO: Tensor, order: tuple[bool, int]
) -> None:
    """For each run (slot, begin, end), all of as many pairs, write x @ W.T of the pairs and the matrix in that slot. As
    `multiply` otherwise."""
    x, slot_bytes = as_activations(x_PI, order[0]), weight_SOI.stride(0) * weight_SOI.element_size()
    x_bytes, out_bytes = (rows.stride(0) * rows.element_size() for rows in (x, out_PO))
    x_first, first, out = x.data_ptr(), weight_SOI.data_ptr(), out_PO.data_ptr()
    products = [
        Product(x_first + begin * x_bytes, first + slot * slot_bytes, 0, out + begin * out_bytes)
        for slot, begin, _ in runs
    ]
    _, begin, end = runs[0]
    multiply_each(products, (end - begin, *weight_SOI.shape[1:]), out_PO.stride(0), *order)


def multiply_each(
    products: Sequence[Product], shape: tuple[int, int, int], out_stride: int, paired: bool, chunk: int
) -> None:
    """Some products of one shape (M, O, I) as one piece of work."""
    tokens, outputs, inputs = shape
    table = np.array(products, np.int64)
    job = (table.ctypes.data, outputs, inputs, out_stride, chunk // STEP)
    run(_multiplier(paired, tokens), len(products) * -(-outputs // ROWS), job, len(products) * outputs * inputs)


@cache
def _multiplier(paired: bool, tokens: int) -> Any:
    """Compiled for each number of rows: their sums are registers."""
    x_bytes = 4 if paired else 2

    @kernel
    def multiply_in_order(data):  # type: ignore[no-untyped-def]
        job, begin, end = share(data)
        outputs, inputs, out_stride, chunk = job[1], job[2], job[3], job[4]
        tiles = (outputs + ROWS - 1) // ROWS
        row, sums = 2 * inputs, np.empty((tokens, ROWS), np.float32)
        for i in range(begin, end):
            x, weight, bias, out = array_at(job[0], (i // tiles + 1, 4), np.int64)[i // tiles]
            next_weight = (
                array_at(job[0], ((i + 1) // tiles + 1, 4), np.int64)[(i + 1) // tiles, 1] if i + 1 < end else weight
            )
            o = min(ROWS * (i % tiles), outputs - ROWS)  # the last tile may overlap the one before it
            w, ahead = weight + o * row, next_weight + min(ROWS * ((i + 1) % tiles), outputs - ROWS) * row
            x_row = x_bytes * inputs
            add_up_tile(paired, tokens, w, row, ahead, x, x_row, inputs // STEP, chunk, sums.ctypes.data, 4 * ROWS)
            write_rounded(sums, bias + 2 * o if bias != 0 else 0, out + 2 * o, out_stride)

    return multiply_in_order
