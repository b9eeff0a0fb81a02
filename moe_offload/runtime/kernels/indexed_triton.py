"""`indexed_mm` as one Triton kernel: each pair's matrix is read where it lies in the bank, once, and nothing is copied.

Shapes: P token-expert pairs, S slots, H hidden, M rows of one expert's matrix.

For few pairs a product is as fast as its matrix is read, so a program takes a few rows of one pair's matrix and walks
along H, multiplying and adding in float32 registers; tensor cores would wait for the same bytes. How a matrix lies
decides the tile: wide along H where a row is contiguous, tall along M where a column is (a transposed weight).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What a program multiplies at once: 32 products a thread, in loads of 16 bytes (bf16).

    Both tiles below are such that x can be read in the very layout it is multiplied in, so that no warp waits for
    another within the loop. Others cost two barriers a step: look for bar.sync in the loop of the PTX.
    """

    rows: int
    columns: int
    warps: int


ALONG_H = Tile(4, 256, 1)  # where H is contiguous: 512 bytes of each row
ALONG_M = Tile(64, 128, 8)  # where M is: 128 bytes of each column


def indexed_mm(x_PH: Tensor, weight_SMH: Tensor, slots_P: Tensor) -> Tensor:
    """`out[p] = weight[slots[p]] @ x[p]`, [P, M], in x's dtype; sums in float32. `weight_SMH` may be any view."""
    pairs, hidden = x_PH.shape
    _, rows, columns = weight_SMH.shape
    if hidden != columns or len(slots_P) != pairs:
        raise ValueError(f"x {[*x_PH.shape]} and {len(slots_P)} slots do not fit weights {[*weight_SMH.shape]}")
    out_PM = torch.empty(pairs, rows, dtype=x_PH.dtype, device=x_PH.device)
    slot_stride, row_stride, column_stride = weight_SMH.stride()
    tile = tile_of(weight_SMH)
    _indexed_mm[(triton.cdiv(rows, tile.rows), pairs)](
        x_PH,
        weight_SMH,
        slots_P,
        out_PM,
        rows,
        hidden,
        x_PH.stride(0),
        x_PH.stride(1),
        slot_stride,
        row_stride,
        column_stride,
        slots_P.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_H=tile.columns,
        num_warps=tile.warps,
    )
    return out_PM


def tile_of(weight_SMH: Tensor) -> Tile:
    """The tile for a matrix that lies so."""
    _, row_stride, column_stride = weight_SMH.stride()
    return ALONG_H if column_stride <= row_stride else ALONG_M


@triton.jit
def _indexed_mm(
    x_PH,
    weight_SMH,
    slots_P,
    out_PM,
    M,
    H,
    x_stride_p,
    x_stride_h,
    stride_s,
    stride_m,
    stride_h,
    slots_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    p = tl.program_id(1)
    slot = tl.load(slots_P + p * slots_stride).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight_M = weight_SMH + slot * stride_s + m.to(tl.int64) * stride_m
    sum_MH = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        x_H = tl.load(x_PH + p * x_stride_p + h * x_stride_h, mask=h < H, other=0.0)
        inside = (m < M)[:, None] & (h < H)[None, :]
        weight_MH = tl.load(weight_M[:, None] + h[None, :].to(tl.int64) * stride_h, mask=inside, other=0.0)
        sum_MH += weight_MH.to(tl.float32) * x_H.to(tl.float32)[None, :]
    tl.store(out_PM + p * M + m, tl.sum(sum_MH, 1).to(out_PM.dtype.element_ty), mask=m < M)
