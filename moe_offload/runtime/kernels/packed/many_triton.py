"""`grouped_mm` of weights that lie packed in their rows: many pairs, those of one expert next to each other.

Shapes: P token-expert pairs, S slots, B bytes of a row, H hidden, O outputs of one expert's matrix.

The tiles are those of `grouped_triton.py`; a tile of the matrix is unpacked into registers, and multiplied from there
as if it had been loaded.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....experts import RowCodes
from ..grouped_triton import HALF, Tile, tile_table
from .few_triton import check_operands
from .unpack_triton import operands, row_of, settings, unpack, widen_scale

FULL = Tile(32, 64, 32, 4, 2)  # of 4 bytes: what is unpacked needs registers, too


def grouped_mm(x_PH: Tensor, rows_SB: Tensor, slots_P: Tensor, codes: RowCodes) -> Tensor:
    """`out[p] = weight[slots[p]] @ x[p]`, [P, O], in x's dtype; sums in float32.

    Made for pairs of one slot that lie next to each other; others are as right, and slower. Raises `ValueError` where
    the shapes or dtypes do not fit.
    """
    check_operands(x_PH, rows_SB, slots_P, codes)
    pairs, columns = len(x_PH), codes.rows
    out_PO = torch.empty(pairs, columns, dtype=x_PH.dtype, device=x_PH.device)
    if not out_PO.numel():
        return out_PO
    tile = HALF if x_PH.itemsize == 2 else FULL
    tiles, begin_T = tile_table(slots_P, tile.pairs)
    programs = min(pairs, triton.cdiv(pairs, tile.pairs) + min(len(rows_SB), pairs))
    _many[(programs * triton.cdiv(columns, tile.columns),)](
        x_PH,
        slots_P,
        out_PO,
        begin_T,
        tiles,
        *operands(rows_SB, codes),
        columns,
        programs,
        x_PH.stride(0),
        x_PH.stride(1),
        slots_P.stride(0),
        BLOCK_P=tile.pairs,
        BLOCK_O=tile.columns,
        BLOCK_H=tile.hidden,
        **settings(codes, tile.hidden),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_PO


@triton.jit(do_not_specialize=["programs"])  # it is another for every prompt
def _many(
    x_PH,
    slots_P,
    out_PO,
    begin_T,
    tiles,
    rows_SB,
    scales_SN,
    row_stride,
    scales_stride,
    codes_at,
    codes_step,
    scales_at,
    scales_step,
    columns,
    programs,
    x_stride_p,
    x_stride_h,
    slots_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
    SCALES_OF_ROW: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    PER_BYTE: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    TYPE: tl.constexpr,
):
    # Programs that run at the same time read the same pairs and the matrix of the same slot.
    blocks = tl.cdiv(columns, BLOCK_O)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    begin_O, row_O = row_of(o, codes_at, codes_step, OUTPUTS)
    begin_O += row_O * (INPUTS // PER_BYTE)
    scale_O, row_O = row_of(o, scales_at, scales_step, OUTPUTS)
    scale_O += row_O // ROWS_PER_SCALE * SCALES_OF_ROW
    run, byte = tl.arange(0, RUNS), tl.arange(0, RUN // PER_BYTE)
    for t in range(tl.program_id(0) // blocks, tl.load(tiles), programs):
        begin = tl.load(begin_T + t)
        end = tl.load(begin_T + t + 1)
        slot = tl.load(slots_P + begin.to(tl.int64) * slots_stride).to(tl.int64)
        p = begin + tl.arange(0, BLOCK_P)
        x_P = x_PH + p.to(tl.int64) * x_stride_p
        codes_B, scales_N = rows_SB + slot * row_stride, scales_SN + slot * scales_stride
        sum_PO = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for first in range(0, INPUTS, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            x_inside = (p < end)[:, None] & (h < INPUTS)[None, :]
            part_PH = tl.load(x_P[:, None] + h[None, :].to(tl.int64) * x_stride_h, mask=x_inside, other=0.0)
            h_R = first + run * RUN
            inside_OR = (o < columns)[:, None] & (h_R < INPUTS)[None, :]
            at_OR = scale_O[:, None] + (h_R // COLUMNS_PER_SCALE)[None, :]
            scale_OR1 = widen_scale(tl.load(scales_N + at_OR, mask=inside_OR, other=0))[:, :, None]
            at_RB = first // PER_BYTE + run[:, None] * (RUN // PER_BYTE) + byte[None, :]
            at_ORB = begin_O[:, None, None] + at_RB[None, :, :]
            code_ORB = tl.load(codes_B + at_ORB, mask=inside_OR[:, :, None], other=0).to(tl.int32)
            if PER_BYTE == 2:
                low_ORB = unpack(code_ORB & 15, scale_OR1, FORMAT, SCALE_TYPE, TYPE)
                high_ORB = unpack(code_ORB >> 4, scale_OR1, FORMAT, SCALE_TYPE, TYPE)
                weight_OH = tl.join(low_ORB, high_ORB).reshape(BLOCK_O, BLOCK_H)
            else:
                weight_OH = unpack(code_ORB, scale_OR1, FORMAT, SCALE_TYPE, TYPE).reshape(BLOCK_O, BLOCK_H)
            sum_PO = tl.dot(part_PH, tl.trans(weight_OH), sum_PO, input_precision="ieee")
        out_P = out_PO + p.to(tl.int64) * columns
        tl.store(out_P[:, None] + o[None, :], sum_PO.to(TYPE), mask=(p < end)[:, None] & (o < columns)[None, :])
