"""Products of bfloat16 rows and matrices [I, O], whose sums are kept in four parts (`turned_steps.py`): torch's bits.

Shapes: P token-expert pairs (or rows of activations), S slots, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..pool import array_at, kernel, share
from .dense import BLOCK_M, FEW, PANEL_BYTES, Run, divide_work, in_pieces, rounded, take_few
from .steps import OUTPUTS, REGISTER, ROWS
from .turned_steps import add_line, add_turned_tile, widen_block

PARTS = 4
BLOCK_O = OUTPUTS * REGISTER
LINE_O = 2048  # outputs of a block where rows are few, at most: so many sums of a row stay in the first-level cache
AHEAD = 2  # inputs whose weights are fetched before they are needed
CHUNK = 32  # inputs of each part whose weights are laid out at a time


def multiply_runs(x_PI: Tensor, weight_SIO: Tensor, runs: Sequence[Run], out_PO: Tensor) -> None:
    """For each run (slot, begin, end) write x @ W of the pairs and the matrix [I, O] in that slot. All bfloat16."""
    few = [one for one in runs if one[2] - one[1] <= FEW]
    if few:
        _kept, places = take_few(x_PI, few)  # alive while the kernel reads it
        divide_work(_few, places, weight_SIO.transpose(1, 2), few, out_PO, 0, _height(out_PO.shape[1]))
    for some in in_pieces([one for one in runs if one[2] - one[1] > FEW], PANEL_BYTES // (4 * x_PI.shape[1])):
        _multiply_many(x_PI, weight_SIO, some, out_PO)


def _height(outputs: int) -> int:
    """Of equal blocks, in whole vectors: long pieces of a row are read faster than short ones."""
    blocks = -(-outputs // LINE_O)
    return min(-(-outputs // blocks // REGISTER) * REGISTER, outputs // REGISTER * REGISTER)


def _multiply_many(x_PI: Tensor, weight_SIO: Tensor, runs: Sequence[Run], out_PO: Tensor) -> None:
    """Tiles of four rows [tile, part, step, row] as float32; what is below the last row of a run is never written."""
    inputs, places = x_PI.shape[1], []
    tiles: list[list[int]] = []
    for _, begin, end in runs:
        places.append(len(tiles))
        tiles += [[min(first + r, end - 1) for r in range(ROWS)] for first in range(begin, end, ROWS)]
    rows = x_PI[torch.tensor(tiles, device="cpu")].float()
    panels = rows.view(len(tiles), ROWS, inputs // PARTS, PARTS).permute(0, 3, 2, 1).contiguous()
    addresses = [panels.data_ptr() + place * ROWS * inputs * 4 for place in places]
    divide_work(_many, addresses, weight_SIO.transpose(1, 2), runs, out_PO, 0, BLOCK_O)


@kernel
def _few(data):  # type: ignore[no-untyped-def]
    job, begin, end = share(data)
    products, outputs, inputs, out_stride, height, each = job[1], job[2], job[3], job[4], job[5], job[6]
    sums = np.empty((4, PARTS, height), np.float32)
    for i in range(begin, end):
        part, product, block = i // (products * each), i // each % products, i % each
        o = (part * each + block) * height
        if o >= outputs:
            continue
        o = min(o, outputs - height)  # the last block may overlap the one before it
        rows, x, weight, _, out = array_at(job[0], (product + 1, 5), np.int64)[product]
        sums[:rows] = 0
        for k in range(inputs):
            for m in range(rows):
                place = sums.ctypes.data + (m * PARTS + k % PARTS) * height * 4
                source = weight + 2 * (k * outputs + o)
                add_line(x + 4 * (m * inputs + k), source, AHEAD * 2 * outputs, height // REGISTER, place)
        for m in range(rows):
            target = array_at(out + 2 * (m * out_stride + o), (height,), np.uint16)
            for c in range(height):
                target[c] = rounded(((sums[m, 0, c] + sums[m, 1, c]) + sums[m, 2, c]) + sums[m, 3, c])


@kernel
def _many(data):  # type: ignore[no-untyped-def]
    job, begin, end = share(data)
    products, outputs, inputs, out_stride, height, each = job[1], job[2], job[3], job[4], job[5], job[6]
    weights = np.empty((PARTS, CHUNK, BLOCK_O), np.float32)
    sums = np.empty((BLOCK_M, PARTS, BLOCK_O), np.float32)
    steps, part_bytes, row_bytes = inputs // PARTS, BLOCK_O * 4, PARTS * BLOCK_O * 4
    for i in range(begin, end):
        part, product, block = i // (products * each), i // each % products, i % each
        o = (part * each + block) * height
        if o >= outputs:
            continue
        o = min(o, outputs - BLOCK_O)  # the last block may overlap the one before it
        rows, x, weight, _, out = array_at(job[0], (product + 1, 5), np.int64)[product]
        for first in range(0, rows, BLOCK_M):
            tiles = (min(BLOCK_M, rows - first) + ROWS - 1) // ROWS
            sums[: tiles * ROWS] = 0
            for step in range(0, steps, CHUNK):
                some = min(CHUNK, steps - step)
                for j in range(PARTS):
                    place = weights.ctypes.data + j * CHUNK * BLOCK_O * 4
                    source = weight + 2 * ((step * PARTS + j) * outputs + o)
                    widen_block(source, 2 * PARTS * outputs, some, place)
                    for tile in range(tiles):
                        panel = x + (((first // ROWS + tile) * PARTS + j) * steps + step) * ROWS * 4
                        total = sums.ctypes.data + tile * ROWS * row_bytes + j * part_bytes
                        add_turned_tile(panel, place, some, total, row_bytes)
            for m in range(min(BLOCK_M, rows - first)):
                target = array_at(out + 2 * ((first + m) * out_stride + o), (BLOCK_O,), np.uint16)
                for c in range(BLOCK_O):
                    target[c] = rounded(((sums[m, 0, c] + sums[m, 1, c]) + sums[m, 2, c]) + sums[m, 3, c])
