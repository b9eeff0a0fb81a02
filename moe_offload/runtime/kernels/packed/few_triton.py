"""`indexed_mm` and `gated_mm` of weights that lie packed in their rows: few pairs, each pair's codes are read once.

Shapes: P token-expert pairs, S slots, B bytes of a row, H hidden, M rows of one expert's matrix, I half of M.

As in `indexed_triton.py` a program takes a few rows of one pair's matrix and walks along H, multiplying and adding in
float32 registers. Two codes share a byte: of x, too, two neighbours are loaded as one word.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ....experts import RowCodes
from .unpack_triton import CODES_PER_BYTE, operands, row_of, settings, unpack_wide, widen_scale

ROWS, BYTES = 4, 128  # of codes at once: 16 bytes a thread of one warp
WORDS = {2: torch.int32, 4: torch.int64}  # two numbers of so many bytes
HAS_LIBDEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


def indexed_mm(x_PH: Tensor, rows_SB: Tensor, slots_P: Tensor, codes: RowCodes) -> Tensor:
    """`out[p] = weight[slots[p]] @ x[p]`, [P, M], in x's dtype; sums in float32. Raises `ValueError` where the shapes
    or dtypes do not fit."""
    return _launch(x_PH, rows_SB, slots_P, codes, codes.rows, gated=False)


def gated_mm(x_PH: Tensor, rows_SB: Tensor, slots_P: Tensor, codes: RowCodes) -> Tensor:
    """`silu(gate) * up`, [P, I], of `[gate, up] = weight[slots[p]] @ x[p]`, both rounded to x's dtype before they meet.
    Raises `ValueError` where the shapes or dtypes do not fit."""
    if codes.rows % 2:
        raise ValueError(f"{codes.rows} rows of a packed weight are no gate and up")
    return _launch(x_PH, rows_SB, slots_P, codes, codes.rows // 2, gated=True)


def check_operands(x_PH: Tensor, rows_SB: Tensor, slots_P: Tensor, codes: RowCodes) -> None:
    pairs, hidden = x_PH.shape
    if hidden != codes.inputs or len(slots_P) != pairs or x_PH.dtype != codes.dtype or rows_SB.dtype != torch.uint8:
        raise ValueError(
            f"x {[*x_PH.shape]} ({x_PH.dtype}) and {len(slots_P)} slots do not fit packed weights [{codes.rows}, "
            f"{codes.inputs}] ({codes.dtype}) in rows of {rows_SB.dtype}"
        )


def _launch(x_PH: Tensor, rows_SB: Tensor, slots_P: Tensor, codes: RowCodes, rows: int, gated: bool) -> Tensor:
    check_operands(x_PH, rows_SB, slots_P, codes)
    pairs = len(x_PH)
    out_PM = torch.empty(pairs, rows, dtype=x_PH.dtype, device=x_PH.device)
    if not out_PM.numel():
        return out_PM
    of_byte = CODES_PER_BYTE[codes.format]
    if x_PH.stride(1) != 1 or x_PH.stride(0) % of_byte or x_PH.storage_offset() % of_byte:
        x_PH = x_PH.clone(memory_format=torch.contiguous_format)  # words begin where every second number does
    x_PW = x_PH.view(WORDS[x_PH.itemsize]) if of_byte == 2 else x_PH
    _few[(triton.cdiv(rows, ROWS), pairs)](
        x_PW,
        slots_P,
        out_PM,
        *operands(rows_SB, codes),
        rows,
        x_PW.stride(0),
        slots_P.stride(0),
        GATED=gated,
        BLOCK_M=ROWS,
        **settings(codes, BYTES * of_byte),
        num_warps=1,
    )
    return out_PM


@triton.jit
def _few(
    x_PW,
    slots_P,
    out_PM,
    rows_SB,
    scales_SN,
    row_stride,
    scales_stride,
    codes_at,
    codes_step,
    scales_at,
    scales_step,
    M,
    x_stride,
    slots_stride,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
    p = tl.program_id(1)
    slot = tl.load(slots_P + p * slots_stride).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_W = x_PW + p * x_stride
    codes_B, scales_N = rows_SB + slot * row_stride, scales_SN + slot * scales_stride
    # fmt: off
    sum_M = _multiply(
        x_W, codes_B, scales_N, codes_at, codes_step, scales_at, scales_step, m, m < M,
        OUTPUTS, INPUTS, ROWS_PER_SCALE, COLUMNS_PER_SCALE, SCALES_OF_ROW, RUN, RUNS,
        PER_BYTE, FORMAT, SCALE_TYPE, TYPE,
    )
    if GATED:
        up_M = _multiply(
            x_W, codes_B, scales_N, codes_at, codes_step, scales_at, scales_step, m + M, m < M,
            OUTPUTS, INPUTS, ROWS_PER_SCALE, COLUMNS_PER_SCALE, SCALES_OF_ROW, RUN, RUNS,
            PER_BYTE, FORMAT, SCALE_TYPE, TYPE,
        )
        gate_M = sum_M.to(TYPE).to(tl.float32)
        exp_M = libdevice.exp(-gate_M) if HAS_LIBDEVICE else tl.exp(-gate_M)
        sum_M = gate_M / (exp_M + 1.0) * up_M.to(TYPE).to(tl.float32)
    # fmt: on
    tl.store(out_PM + p * M + m, sum_M.to(TYPE), mask=m < M)


@triton.jit
def _multiply(
    x_W,
    codes_B,
    scales_N,
    codes_at,
    codes_step,
    scales_at,
    scales_step,
    m,
    inside_M,
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
    """The products of outputs `m` with x, in float32. Tiles are [outputs, runs of one scale, bytes of a run]."""
    begin_M, o = row_of(m, codes_at, codes_step, OUTPUTS)
    begin_M += o * (INPUTS // PER_BYTE)
    scale_M, o = row_of(m, scales_at, scales_step, OUTPUTS)
    scale_M += o // ROWS_PER_SCALE * SCALES_OF_ROW
    run, byte = tl.arange(0, RUNS), tl.arange(0, RUN // PER_BYTE)
    sum_MRB = tl.zeros([m.shape[0], RUNS, RUN // PER_BYTE], tl.float32)
    for first in range(0, INPUTS, RUN * RUNS):
        h = first + run * RUN
        inside_MR1 = (inside_M[:, None] & (h < INPUTS)[None, :])[:, :, None]
        at_MR1 = (scale_M[:, None] + (h // COLUMNS_PER_SCALE)[None, :])[:, :, None]
        scale_MR1 = widen_scale(tl.load(scales_N + at_MR1, mask=inside_MR1, other=0))
        at_RB = first // PER_BYTE + run[:, None] * (RUN // PER_BYTE) + byte[None, :]
        at_MRB = begin_M[:, None, None] + at_RB[None, :, :]
        code_MRB = tl.load(codes_B + at_MRB, mask=inside_MR1, other=0).to(tl.int32)
        # Loaded in the shape, and so in the layout, of the codes: else these would go through shared memory.
        x_MRB = tl.load(x_W + (0 * m)[:, None, None] + at_RB[None, :, :], mask=inside_MR1, other=0)
        if PER_BYTE == 2:
            low_MRB, high_MRB = _halves(x_MRB, TYPE)
            sum_MRB += unpack_wide(code_MRB & 15, scale_MR1, FORMAT, SCALE_TYPE, TYPE) * low_MRB
            sum_MRB += unpack_wide(code_MRB >> 4, scale_MR1, FORMAT, SCALE_TYPE, TYPE) * high_MRB
        else:
            sum_MRB += unpack_wide(code_MRB, scale_MR1, FORMAT, SCALE_TYPE, TYPE) * x_MRB.to(tl.float32)
    return tl.sum(tl.sum(sum_MRB, 2), 1)


@triton.jit
def _halves(word, TYPE: tl.constexpr):
    """The two numbers of a word, the first one first, in float32."""
    if TYPE == tl.bfloat16:
        low, high = word << 16, word & -65536
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    elif TYPE == tl.float16:
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
