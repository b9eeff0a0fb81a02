"""`grouped_mm` as one Triton kernel: many pairs, those of one expert next to each other, multiplied tile by tile.

Shapes: P token-expert pairs, S slots, H hidden, O columns of one expert's matrix.

    slots_P   5 5 5 5 5 5 2 2 2 7        runs of equal slots, in any order of slots
    tiles     |5 5 5 5|5 5|2 2|2|7|      cut where the slot changes, and every BLOCK_P pairs (here 4)

Where the tiles begin is worked out by tensor operations on the device, and the grid follows from P and S alone, so
nothing waits for the host. With one run a slot there is a program for every tile. Slots in any other order give more
tiles than that: programs then take several in turn, which is slower and as right.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What a program multiplies at once: `hidden` at a time, `stages` of them on their way."""

    pairs: int
    columns: int
    hidden: int
    warps: int
    stages: int


HALF = Tile(64, 128, 64, 4, 4)  # of 2 bytes: the least that a warp group's tensor cores take, 96 KiB under way
FULL = Tile(64, 64, 32, 4, 3)  # of 4 bytes, multiplied without tensor cores


def grouped_mm(x_PH: Tensor, weight_SHO: Tensor, slots_P: Tensor) -> Tensor:
    """`out[p] = x[p] @ weight[slots[p]]`, [P, O], in x's dtype; sums in float32. `weight_SHO` may be any view.

    Made for pairs of one slot that lie next to each other; others are as right, and slower. Raises `ValueError` where
    the shapes or dtypes do not fit.
    """
    pairs, hidden = x_PH.shape
    slots, rows, columns = weight_SHO.shape
    if hidden != rows or len(slots_P) != pairs or x_PH.dtype != weight_SHO.dtype:
        raise ValueError(
            f"x {[*x_PH.shape]} ({x_PH.dtype}) and {len(slots_P)} slots do not fit weights {[*weight_SHO.shape]} "
            f"({weight_SHO.dtype})"
        )
    out_PO = torch.empty(pairs, columns, dtype=x_PH.dtype, device=x_PH.device)
    if not out_PO.numel():
        return out_PO
    tile = HALF if x_PH.itemsize == 2 else FULL
    tiles, begin_T = tile_table(slots_P, tile.pairs)
    programs = min(pairs, triton.cdiv(pairs, tile.pairs) + min(slots, pairs))
    _grouped_mm[(programs * triton.cdiv(columns, tile.columns),)](
        x_PH,
        weight_SHO,
        slots_P,
        out_PO,
        begin_T,
        tiles,
        hidden,
        columns,
        programs,
        x_PH.stride(0),
        x_PH.stride(1),
        *weight_SHO.stride(),
        slots_P.stride(0),
        BLOCK_P=tile.pairs,
        BLOCK_O=tile.columns,
        BLOCK_H=tile.hidden,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_PO


def tile_table(slots_P: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """How many tiles there are (int32 [1]), and where each begins: int32 [P + 1], P behind the last one."""
    numbers = torch.arange(len(slots_P) + 1, dtype=torch.int32, device=slots_P.device)
    begins_P = numbers[:-1] % block == 0
    begins_P[1:] |= slots_P[1:] != slots_P[:-1]
    so_far_P = begins_P.cumsum(0, dtype=torch.int32)
    return so_far_P[-1:], torch.searchsorted(so_far_P, numbers + 1, out_int32=True)


@triton.jit(do_not_specialize=["programs"])  # it is another for every prompt
def _grouped_mm(
    x_PH,
    weight_SHO,
    slots_P,
    out_PO,
    begin_T,
    tiles,
    hidden,
    columns,
    programs,
    x_stride_p,
    x_stride_h,
    stride_s,
    stride_h,
    stride_o,
    slots_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Programs that run at the same time read the same pairs and the matrix of the same slot.
    blocks = tl.cdiv(columns, BLOCK_O)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    for t in range(tl.program_id(0) // blocks, tl.load(tiles), programs):
        begin = tl.load(begin_T + t)
        end = tl.load(begin_T + t + 1)
        slot = tl.load(slots_P + begin.to(tl.int64) * slots_stride).to(tl.int64)
        p = begin + tl.arange(0, BLOCK_P)
        x_P = x_PH + p.to(tl.int64) * x_stride_p
        weight_O = weight_SHO + slot * stride_s + o.to(tl.int64) * stride_o
        sum_PO = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for first in range(0, hidden, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            x_inside = (p < end)[:, None] & (h < hidden)[None, :]
            weight_inside = (h < hidden)[:, None] & (o < columns)[None, :]
            part_PH = tl.load(x_P[:, None] + h[None, :].to(tl.int64) * x_stride_h, mask=x_inside, other=0.0)
            weight_HO = tl.load(weight_O[None, :] + h[:, None].to(tl.int64) * stride_h, mask=weight_inside, other=0.0)
            sum_PO = tl.dot(part_PH, weight_HO, sum_PO, input_precision="ieee")
        out_P = out_PO + p.to(tl.int64) * columns
        out = sum_PO.to(out_PO.dtype.element_ty)
        tl.store(out_P[:, None] + o[None, :], out, mask=(p < end)[:, None] & (o < columns)[None, :])
