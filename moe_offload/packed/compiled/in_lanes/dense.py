"""Products of bfloat16 rows whose sums are kept in 64 lanes (`steps.py`): torch's bits, of one row or of a prompt.

Shapes: P token-expert pairs (or rows of activations), S slots, I inputs, O outputs.

Of a few rows each output is one pass over its weights, as they lie in memory. Of more, blocks of activations and of
weights are laid out as float32 in the order in which the tiles read them, and stay in a core's own cache meanwhile.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence

import llvmlite.binding as ll
import numpy as np
import torch
from torch import Tensor

from ..pool import array_at, compiled, kernel, run, share
from .steps import LANES, OUTPUTS, REGISTERS, ROWS, VECTOR, add_tile, dot, fold, widen_row

FEW = 4  # rows for which weights are read as they lie
BLOCK_O, BLOCK_M = 4 * OUTPUTS, 12 * ROWS  # outputs and rows whose sums are kept at a time: 144 KB
CHUNK = 32  # steps: the weights of a block take 96 KB then, and those of one register 12
PANEL_BYTES = 8 << 20  # of activations that are laid out at a time
COLUMNS = 5  # of the table of products: rows, and the addresses of x, weight, bias (or 0) and result

Run = tuple[int, int, int]  # a slot, and the pairs [begin, end) that are for the matrix in it


def can_run() -> bool:
    """Whether this processor has the instructions that torch's loops have."""
    features = ll.get_host_cpu_features() if platform.machine().lower() in ("x86_64", "amd64") else {}
    return bool(features.get("avx2") and features.get("fma"))


def multiply(x_MI: Tensor, weight_OI: Tensor, out_MO: Tensor, bias_O: Tensor | None = None) -> None:
    """Write x @ W.T, and the bias added last. All bfloat16; rows in one piece."""
    multiply_runs(x_MI, weight_OI[None], [(0, 0, len(x_MI))], out_MO, bias_O)


def multiply_runs(
    x_PI: Tensor,
    weight_SOI: Tensor,
    runs: Sequence[Run],
    out_PO: Tensor,
    bias_O: Tensor | None = None,
) -> None:
    """For each run (slot, begin, end) write x @ W.T of the pairs and the matrix in that slot."""
    bias = 0 if bias_O is None else bias_O.data_ptr()
    few = [one for one in runs if one[2] - one[1] <= FEW]
    if few:
        _multiply_few(x_PI, weight_SOI, few, out_PO, bias)
    for some in in_pieces([one for one in runs if one[2] - one[1] > FEW], PANEL_BYTES // (4 * x_PI.shape[1])):
        _multiply_many(x_PI, weight_SOI, some, out_PO, bias)


def in_pieces(runs: Sequence[Run], most: int) -> Iterator[list[Run]]:
    """The same runs, of at most so many pairs together, or one block of rows."""
    most = max(BLOCK_M, most // BLOCK_M * BLOCK_M)
    some: list[Run] = []
    room = most
    for slot, begin, end in runs:
        while begin < end:
            stop = min(end, begin + room)
            some.append((slot, begin, stop))
            room -= -(-(stop - begin) // ROWS) * ROWS
            begin = stop
            if room <= 0:
                yield some
                some, room = [], most
    if some:
        yield some


def _multiply_few(x_PI: Tensor, weight_SOI: Tensor, runs: Sequence[Run], out_PO: Tensor, bias: int) -> None:
    _kept, places = take_few(x_PI, runs)  # alive while the kernel reads it
    divide_work(_few, places, weight_SOI, runs, out_PO, bias, LANES // 2)


def take_few(x_PI: Tensor, runs: Sequence[Run]) -> tuple[Tensor, list[int]]:
    """The pairs of those runs alone as float32, of all pairs of a prompt, and the address of each run's."""
    x, places = torch.cat([x_PI[begin:end] for _, begin, end in runs]).float(), []
    place = x.data_ptr()
    for _, begin, end in runs:
        places.append(place)
        place += (end - begin) * x.shape[1] * x.element_size()
    return x, places


def _multiply_many(x_PI: Tensor, weight_SOI: Tensor, runs: Sequence[Run], out_PO: Tensor, bias: int) -> None:
    inputs, first = x_PI.shape[1], x_PI.data_ptr()
    tiles = [(begin + ROWS * i, end) for _, begin, end in runs for i in range(-(-(end - begin) // ROWS))]
    panels = x_PI.new_empty((len(tiles), ROWS * inputs), dtype=torch.float32)
    table, row_bytes = np.array(tiles, np.int64), x_PI.stride(0) * x_PI.element_size()
    job = (table.ctypes.data, first, row_bytes, inputs // LANES, panels.data_ptr())
    run(_lay_out, len(tiles), job, panels.numel())
    places, begin = [], panels.data_ptr()
    for _, start, end in runs:
        places.append(begin)
        begin += -(-(end - start) // ROWS) * ROWS * inputs * 4
    divide_work(_many, places, weight_SOI, runs, out_PO, bias, BLOCK_O)


def divide_work(
    function: kernel,
    places: Sequence[int],
    weight_SOI: Tensor,
    runs: Sequence[Run],
    out_PO: Tensor,
    bias: int,
    height: int,
) -> None:
    """Run a kernel on blocks of `height` outputs, of which each thread has the same part of every product: experts have
    more rows and fewer. `places` are the activations of each, as the kernel reads them; `bias` is an address, or 0."""
    _, outputs, inputs = weight_SOI.shape
    out, out_bytes = out_PO.data_ptr(), out_PO.stride(0) * out_PO.element_size()
    weight, slot_bytes = weight_SOI.data_ptr(), weight_SOI.stride(0) * weight_SOI.element_size()
    table = np.array(
        [
            (end - begin, place, weight + slot * slot_bytes, bias, out + begin * out_bytes)
            for place, (slot, begin, end) in zip(places, runs, strict=True)
        ],
        np.int64,
    )
    height = min(height, outputs)
    blocks = -(-outputs // height)
    parts = min(torch.get_num_threads(), blocks)
    each = -(-blocks // parts)
    job = (table.ctypes.data, len(table), outputs, inputs, out_PO.stride(0), height, each)
    work = outputs * inputs * sum(end - begin for _, begin, end in runs)
    run(function, parts * len(table) * each, job, work)


@compiled
def rounded(number):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 that is nearest to a float32, the even one of two."""
    bits = np.float32(number).view(np.uint32)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def _finished(total, bias, o):  # type: ignore[no-untyped-def]
    if bias != 0:
        bits = array_at(bias, (o + 1,), np.uint16)[o]
        total += np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return rounded(total)


@kernel
def _lay_out(data):  # type: ignore[no-untyped-def]
    """Tiles of four rows as float32, in the order in which `add_tile` reads them; below the last row zeros."""
    job, begin, end = share(data)
    first, row_bytes, steps, panels = job[1], job[2], job[3], job[4]
    for i in range(begin, end):
        row, last = array_at(job[0], (i + 1, 2), np.int64)[i]
        panel = panels + i * ROWS * steps * LANES * 4
        for r in range(ROWS):
            if row + r < last:
                widen_row(
                    first + (row + r) * row_bytes, steps, panel + r * VECTOR, ROWS * VECTOR, steps * ROWS * VECTOR
                )
            else:
                for g in range(REGISTERS):
                    for step in range(steps):
                        array_at(panel + ((g * steps + step) * ROWS + r) * VECTOR, (8,), np.float32)[:] = 0


@kernel
def _few(data):  # type: ignore[no-untyped-def]
    job, begin, end = share(data)
    products, outputs, steps, out_stride, height, each = job[1], job[2], job[3] // LANES, job[4], job[5], job[6]
    for i in range(begin, end):
        part, product, block = i // (products * each), i // each % products, i % each
        o = (part * each + block) * height
        rows, x, weight, bias, out = array_at(job[0], (product + 1, COLUMNS), np.int64)[product]
        for output in range(o, min(o + height, outputs)):
            row = weight + output * steps * LANES * 2
            for m in range(rows):
                total = dot(x + m * steps * LANES * 4, row, steps)
                array_at(out + 2 * (m * out_stride + output), (1,), np.uint16)[0] = _finished(total, bias, output)


@kernel
def _many(data):  # type: ignore[no-untyped-def]
    job, begin, end = share(data)
    products, outputs, steps, out_stride, height, each = job[1], job[2], job[3] // LANES, job[4], job[5], job[6]
    weights = np.empty(REGISTERS * CHUNK * BLOCK_O * 8, np.float32)
    sums = np.empty((BLOCK_M, BLOCK_O, LANES), np.float32)
    w, s, row_bytes = weights.ctypes.data, sums.ctypes.data, BLOCK_O * LANES * 4
    for i in range(begin, end):
        part, product, block = i // (products * each), i // each % products, i % each
        o = (part * each + block) * height
        if o >= outputs:
            continue
        o = min(o, outputs - BLOCK_O)  # the last block may overlap the one before it
        rows, x, weight, bias, out = array_at(job[0], (product + 1, COLUMNS), np.int64)[product]
        for m in range(0, rows, BLOCK_M):
            tiles = (min(BLOCK_M, rows - m) + ROWS - 1) // ROWS
            sums[: tiles * ROWS] = 0
            for step in range(0, steps, CHUNK):
                some = min(CHUNK, steps - step)
                group = some * OUTPUTS * VECTOR  # bytes of one register of three outputs
                for c in range(BLOCK_O):
                    source = weight + ((o + c) * steps + step) * LANES * 2
                    place = w + c // OUTPUTS * REGISTERS * group + c % OUTPUTS * VECTOR
                    widen_row(source, some, place, OUTPUTS * VECTOR, group)
                for g in range(REGISTERS):
                    for tile in range(tiles):
                        panel = x + ((m // ROWS + tile) * REGISTERS * steps + g * steps + step) * ROWS * VECTOR
                        for c in range(BLOCK_O // OUTPUTS):
                            place = s + tile * ROWS * row_bytes + c * OUTPUTS * LANES * 4 + g * VECTOR
                            add_tile(panel, w + (c * REGISTERS + g) * group, some, place, row_bytes)
            for row in range(min(BLOCK_M, rows - m)):
                target = array_at(out + 2 * ((m + row) * out_stride + o), (BLOCK_O,), np.uint16)
                for c in range(BLOCK_O):
                    target[c] = _finished(fold(s + (row * BLOCK_O + c) * LANES * 4), bias, o + c)
