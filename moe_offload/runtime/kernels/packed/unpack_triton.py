"""A code and its scale, unpacked in registers: the number that the CPU's formula (`moe_offload/packed`) makes of them.

    mxfp4   value of 4 bits * 2^(e - 127)                     rounded to the dtype of x
    fp8     value of 8 bits * scale                           rounded to the dtype of x
    int4    (4 bits - 8) * scale, rounded to its dtype        rounded to the dtype of x

Both factors are exact in float32, and their product is rounded as the CPU rounds it: there is nothing between the two
that could be fused. Codes become floats by integer operations, for what a cast does to subnormals and to NaN differs
from device to device. A NaN is a NaN, whichever.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....experts import RowCodes

CODES_PER_BYTE = {"mxfp4": 2, "fp8": 1, "int4": 2}
FORMATS = {"mxfp4": 0, "fp8": 1, "int4": 2}
MXFP4, FP8 = tl.constexpr(0), tl.constexpr(1)
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
#: How a scale is loaded: exponents as bytes, bfloat16 as its bits.
AS_LOADED = {torch.uint8: torch.uint8, torch.float8_e8m0fnu: torch.uint8, torch.bfloat16: torch.int16}
NAN_BITS = tl.constexpr(0x7FC00000)


def operands(rows_SB: Tensor, codes: RowCodes) -> tuple[Any, ...]:
    """What every kernel is given of a bank of rows [S, B] in bytes: codes, scales, and where they are."""
    scales_SN = rows_SB.view(AS_LOADED.get(codes.scale_dtype, codes.scale_dtype))
    where = (codes.codes_at, codes.codes_step, codes.scales_at, codes.scales_step)
    return rows_SB, scales_SN, rows_SB.stride(0), scales_SN.stride(0), *where


def settings(codes: RowCodes, columns: int) -> dict[str, Any]:
    """What kernels are compiled for: the format, and `RUN` neighbouring columns that surely have one scale, out of so
    many (a power of two) that are taken at once."""
    blocks_of_rows, blocks = codes.grid
    per_scale = codes.inputs // blocks
    run = min(per_scale & -per_scale, columns)
    return {
        "OUTPUTS": codes.outputs,
        "INPUTS": codes.inputs,
        "ROWS_PER_SCALE": codes.outputs // blocks_of_rows,
        "COLUMNS_PER_SCALE": per_scale,
        "SCALES_OF_ROW": blocks,
        "RUN": run,
        "RUNS": columns // run,
        "PER_BYTE": CODES_PER_BYTE[codes.format],
        "FORMAT": FORMATS[codes.format],
        "SCALE_TYPE": TYPES.get(codes.scale_dtype, tl.float32),
        "TYPE": TYPES[codes.dtype],
    }


@triton.jit
def widen_scale(scale):
    """A scale as it was loaded, in float32."""
    if scale.dtype == tl.uint8:  # 2^(e - 127), where 0 is the subnormal 2^-127
        wide = scale.to(tl.int32)
        return tl.where(wide == 0, 1 << 22, wide << 23).to(tl.float32, bitcast=True)
    elif scale.dtype == tl.int16:
        return (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)


@triton.jit
def widen_code(code, FORMAT: tl.constexpr):
    """What a code (int32, 0 to 15, or to 255) means, in float32.

    Exponent and fraction of a small float go where float32 has its own; what is a subnormal there becomes one here, and
    one exact multiplication sets the bias right for both.
    """
    if FORMAT == MXFP4:
        return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 2.0**126
    elif FORMAT == FP8:
        value = (((code & 0x7F) << 20) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**120
        nan = tl.full(code.shape, NAN_BITS, tl.int32).to(tl.float32, bitcast=True)
        return tl.where((code & 0x7F) == 0x7F, nan, value)
    else:
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + code, less 2^23 + 8


@triton.jit
def unpack(code, scale, FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, TYPE: tl.constexpr):
    """The number itself, in TYPE. `scale` is in float32."""
    value = widen_code(code, FORMAT) * scale
    if FORMAT == MXFP4 or FORMAT == FP8:
        return value.to(TYPE)
    else:
        return value.to(SCALE_TYPE).to(TYPE)


@triton.jit
def unpack_wide(code, scale, FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, TYPE: tl.constexpr):
    """The same number in float32."""
    if FORMAT == MXFP4 and TYPE == tl.bfloat16:  # two bits and an exponent: there is nothing to round
        return widen_code(code, FORMAT) * scale
    else:
        return unpack(code, scale, FORMAT, SCALE_TYPE, TYPE).to(tl.float32)


@triton.jit
def row_of(m, at, step, OUTPUTS: tl.constexpr):
    """Where in a row of the bank the matrix begins in which output `m` is, and which of its rows that is."""
    matrix = m // OUTPUTS
    return at + matrix * step, m - matrix * OUTPUTS
