"""Products straight from the codes, with the bits of unpacking a matrix to bfloat16 and multiplying it by torch.

A weight is made in a register as unpacking makes it (`code_pairs.py`), and added up in torch's order (`sums.py`), so
that the matrix is never written. Shapes: M rows, I inputs, O outputs; G groups of one scale in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..dot import FP8, MXFP4
from ..pool import array_at, kernel, run, share
from ..unpack import SCALES as SCALES
from ..vectors import I32, I64, fetch, load, moved
from .code_pairs import CODE_BITS, LINE, load_scale, pairs_of, scale_bytes
from .dense import as_activations as as_activations
from .dense import write_rounded
from .scales import widen_scales
from .sums import STEP, Sums, at_end_of_chunk, denormals_flushed
from .turning import ROWS, turn_quads

QUAD = ir.VectorType(I32, 4)
FLAGS = 4  # the column of a product's row in the table that says whether its scales were ones for these kernels


@intrinsic(prefer_literal=True)
def add_up_packed_tiles(  # type: ignore[no-untyped-def]
    typingctx, form, shared, paired, tokens, tiles, codes, stride, ahead, scales, groups, steps, x, x_stride, chunk, out
):
    """Rows of codes at `codes`, `stride` bytes apart, sixteen in each of the `tiles`, times x; those at `ahead` are
    fetched. Each sum waits for the one before it, so two tiles take hardly longer than one.

    `scales` [tiles, G] as `code_pairs.py` has them; a group is so many `steps`; `out` [tiles, M, 16].
    """
    constants = form.literal_value, bool(shared.literal_value), bool(paired.literal_value)
    counts = tokens.literal_value, tiles.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, stride, ahead, scales, groups, steps, x, x_stride, chunk, out = args[5:]
        (form, shared, paired), (tokens, tiles) = constants, counts
        step_bytes, each = STEP * CODE_BITS[form] // 8, scale_bytes(form, shared)
        with denormals_flushed(b, paired):
            sums = [Sums(b, tokens, paired, x, x_stride) for _ in range(tiles)]
            with cgutils.for_range(b, groups) as group:
                places = [
                    b.add(scales, b.mul(b.add(b.mul(groups, I64(t)), group.index), I64(each))) for t in range(tiles)
                ]
                scale = [load_scale(b, form, shared, place) for place in places]
                with cgutils.for_range(b, steps) as part:
                    step = b.add(b.mul(group.index, steps), part.index)
                    for tile in range(tiles):
                        first = b.add(moved(b, codes, step, step_bytes), b.mul(stride, I64(ROWS * tile)))
                        rows = [b.add(first, b.mul(stride, I64(row))) for row in range(ROWS)]
                        _fetch_some(b, step, LINE // step_bytes, [b.add(row, b.sub(ahead, codes)) for row in rows])
                        words: list[Any] = []
                        for quad in range(step_bytes // 16):
                            words += turn_quads(b, [load(b, QUAD, b.add(row, I64(16 * quad))) for row in rows])
                        sums[tile].add_step(step, pairs_of(b, form, shared, words, scale[tile]))
                    with at_end_of_chunk(b, step, chunk, b.mul(groups, steps)):
                        for some in sums:
                            some.close_chunk()
            for tile, some in enumerate(sums):
                some.write(b.add(out, I64(4 * ROWS * tokens * tile)), I64(4 * ROWS))
        return context.get_dummy_value()

    return types.void(form, shared, paired, tokens, tiles, *[types.int64] * 10), build


def _fetch_some(b: Any, step: Any, steps: int, places: Sequence[Any]) -> None:
    """A line lasts for so many steps: in each of them, the lines of a part of the rows are fetched."""
    turn = b.srem(step, I64(steps))
    each = len(places) // steps
    for i in range(each):
        place = places[i]
        for other in range(1, steps):
            place = b.select(b.icmp_signed("==", turn, I64(other)), places[other * each + i], place)
        fetch(b, place)


class Product(NamedTuple):
    """Addresses of one product: codes, scales, the activations `dense.as_activations` has made, the result."""

    codes: int
    scales: int
    x: int
    out: int


class Shape(NamedTuple):
    """What products that are computed together have in common. Scales lie in a grid of (rows, groups)."""

    form: int
    kind: int  # of a scale
    grid: tuple[int, int]
    outputs: int
    inputs: int


def takes(form: int, scale: Tensor, grid: tuple[int, int], outputs: int, inputs: int) -> bool:
    """Whether groups are whole steps, and the rows enough for a tile."""
    whole = inputs % (STEP * grid[1]) == 0 and outputs >= ROWS
    return whole and scale.dtype in SCALES and (form != MXFP4 or grid[1] >= ROWS)


def multiply_each(
    products: Sequence[Product], shape: Shape, tokens: int, out_stride: int, paired: bool, chunk: int
) -> list[bool]:
    """Write x @ W.T of each, as one piece of work. False for one that has a scale that is not for these kernels: what
    is written for it is of no worth. For what `takes` takes."""
    form, kind, grid, outputs, inputs = shape
    tiles = 2 if outputs >= 2 * ROWS else 1
    block_rows = outputs // grid[0]
    shared = form == FP8 and block_rows % (ROWS * tiles) == 0
    table = np.zeros((len(products), FLAGS + 1), np.int64)
    table[:, :FLAGS] = products
    job = (table.ctypes.data, outputs, inputs, block_rows, grid[1], out_stride, chunk // STEP)
    rows = len(products) * -(-outputs // (ROWS * tiles))
    run(_multiplier(form, kind, shared, paired, tokens, tiles), rows, job, len(products) * outputs * inputs)
    return [not wrong for wrong in table[:, FLAGS].tolist()]


@cache
def _multiplier(form: int, kind: int, shared: bool, paired: bool, tokens: int, tiles: int) -> Any:
    """Compiled for each number of rows: their sums are registers."""
    bits, x_bytes, each, at_once = CODE_BITS[form], 4 if paired else 2, scale_bytes(form, shared), ROWS * tiles

    @kernel
    def multiply_in_order(data):  # type: ignore[no-untyped-def]
        job, begin, end = share(data)
        outputs, inputs, block_rows, groups, out_stride, chunk = job[1], job[2], job[3], job[4], job[5], job[6]
        row, steps, strips = inputs * bits // 8, inputs // STEP // groups, (outputs + at_once - 1) // at_once
        sums, scales_TG = np.empty((tiles, tokens, ROWS), np.float32), np.empty((tiles, groups, each), np.uint8)
        for i in range(begin, end):
            j, after = i // strips, min(i + 1, end - 1)
            table = array_at(job[0], (max(j, after // strips) + 1, FLAGS + 1), np.int64)
            o = min(at_once * (i % strips), outputs - at_once)  # the last strip may overlap the one before it
            w, x, out = table[j, 0] + o * row, table[j, 2], table[j, 3] + 2 * o
            ahead = table[after // strips, 0] + min(at_once * (after % strips), outputs - at_once) * row
            for tile in range(tiles):
                place = scales_TG.ctypes.data + tile * groups * each
                if not widen_scales(form, kind, shared, table[j, 1], o + ROWS * tile, block_rows, groups, place):
                    table[j, FLAGS] = 1
            scales, sums_at = scales_TG.ctypes.data, sums.ctypes.data
            add_up_packed_tiles(
                form,
                shared,
                paired,
                tokens,
                tiles,
                w,
                row,
                ahead,
                scales,
                groups,
                steps,
                x,
                x_bytes * inputs,
                chunk,
                sums_at,
            )
            for tile in range(tiles):
                write_rounded(sums[tile], 0, out + 2 * ROWS * tile, out_stride)

    return multiply_in_order
