"""Codes to bfloat16, for each format: torch's threads share the rows, and each run under one scale is a vector step.

What the steps do not take (a run's last columns, scales so small or large that a result may be denormal or infinite)
goes one by one, by the same formula in float32. Denormals are kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pool import array_at, compiled, kernel, run, share
from .vectors import BFLOAT16, EXPONENT, FLOAT32, expand_fp8, expand_int4, expand_mxfp4

#: dtype of a scale -> how the kernels read it.
SCALES = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float8_e8m0fnu: EXPONENT,
    torch.uint8: EXPONENT,
}
HALF = np.uint32(0x7FFF)
ONE, SIXTEEN = np.uint32(1), np.uint32(16)


def unpack_mxfp4(codes: Tensor, scales: Tensor, table: Tensor, out_OI: Tensor) -> None:
    """`table` [256, 16]: the values of the sixteen codes under each scale, in bfloat16."""
    outputs, groups = scales.shape
    job = (codes.data_ptr(), scales.data_ptr(), out_OI.data_ptr(), outputs, groups, out_OI.stride(0), table.data_ptr())
    run(_mxfp4, outputs, job, out_OI.numel())


def unpack_fp8(codes: Tensor, scale: Tensor, grid: tuple[int, int], out_OI: Tensor) -> None:
    """`grid`: into how many blocks rows and columns are cut."""
    outputs, inputs = codes.shape
    where = (codes.data_ptr(), scale.data_ptr(), out_OI.data_ptr(), outputs, inputs, out_OI.stride(0))
    run(_fp8, outputs, (*where, SCALES[scale.dtype], outputs // grid[0], grid[1]), out_OI.numel())


def unpack_int4(codes: Tensor, scale: Tensor, out_OI: Tensor) -> None:
    outputs, groups = scale.shape
    where = (codes.data_ptr(), scale.data_ptr(), out_OI.data_ptr(), outputs, out_OI.shape[1], out_OI.stride(0))
    run(_int4(SCALES[scale.dtype]), outputs, (*where, groups, scale.element_size()), out_OI.numel())


@compiled
def scale_at(address, kind, index):  # type: ignore[no-untyped-def]
    """One scale as float32."""
    if kind == FLOAT32:
        return array_at(address + 4 * index, (1,), np.float32)[0]
    if kind == BFLOAT16:
        return np.uint32(np.uint32(array_at(address + 2 * index, (1,), np.uint16)[0]) << SIXTEEN).view(np.float32)
    return power_of_two(array_at(address + index, (1,), np.uint8)[0])


@compiled
def power_of_two(exponent):  # type: ignore[no-untyped-def]
    """e8m0 as float32: 2^(exponent - 127), of which the first is denormal."""
    return np.uint32(np.uint32(exponent) << np.uint32(23) if exponent else np.uint32(1 << 22)).view(np.float32)


@compiled
def rounded(value):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 nearest to a float32 that is a number."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + HALF + ((bits >> SIXTEEN) & ONE)) >> SIXTEEN)


@kernel
def _mxfp4(data):  # type: ignore[no-untyped-def]
    """For very small and very large scales a result may be denormal or infinite: those go one by one."""
    job, begin, end = share(data)
    groups, stride, table = job[4], job[5], job[6]
    for row in range(begin, end):
        codes, scales, out = job[0] + row * groups * 16, job[1] + row * groups, job[2] + row * stride * 2
        scales_G = array_at(scales, (groups,), np.uint8)
        for group in range(groups):
            scale = np.int64(scales_G[group])
            if 2 <= scale <= 251:
                expand_mxfp4(codes + group * 16, scale, table + scale * 32, out + group * 64)
            else:
                _mxfp4_singly(codes + group * 16, table + scale * 32, out + group * 64)


@compiled
def _mxfp4_singly(codes, table, out):  # type: ignore[no-untyped-def]
    codes_J, table_16 = array_at(codes, (16,), np.uint8), array_at(table, (16,), np.uint16)
    out_J = array_at(out, (32,), np.uint16)
    for j in range(16):
        out_J[2 * j], out_J[2 * j + 1] = table_16[codes_J[j] & 15], table_16[codes_J[j] >> 4]


@kernel
def _fp8(data):  # type: ignore[no-untyped-def]
    job, begin, end = share(data)
    columns, stride, kind, block_rows, blocks = job[4], job[5], job[6], job[7], job[8]
    width = columns // blocks
    for row in range(begin, end):
        for block in range(blocks):
            scale = scale_at(job[1], kind, row // block_rows * blocks + block)
            codes, out = job[0] + row * columns + block * width, job[2] + (row * stride + block * width) * 2
            steps = width // 32 if 2.0**-100 <= abs(scale) <= 2.0**100 else 0
            expand_fp8(codes, steps, scale, out)
            for j in range(steps * 32, width):
                array_at(out + j * 2, (1,), np.uint16)[0] = _fp8_one(array_at(codes + j, (1,), np.uint8)[0], scale)


@compiled
def _fp8_one(code, scale):  # type: ignore[no-untyped-def]
    magnitude = np.uint32(code & np.uint8(0x7F))
    if magnitude < 8:
        value = np.float32(magnitude) * np.float32(2.0**-9)
    else:
        value = np.uint32((magnitude << np.uint32(20)) + np.uint32(120 << 23)).view(np.float32)
    return rounded(value * scale) ^ np.uint16((np.uint16(code) & 0x80) << 8)


@cache
def _int4(kind: int) -> Any:
    @kernel
    def unpack(data):  # type: ignore[no-untyped-def]
        job, begin, end = share(data)
        columns, stride, groups, scale_bytes = job[4], job[5], job[6], job[7]
        width = columns // 2 // groups  # bytes
        steps = width // 16
        for row in range(begin, end):
            codes, scales, out = (
                job[0] + row * columns // 2,
                job[1] + row * groups * scale_bytes,
                job[2] + row * stride * 2,
            )
            expand_int4(kind, codes, scales, groups, steps, width, out)
            if steps * 16 < width:
                for group in range(groups):
                    scale = scale_at(scales, kind, group)
                    for j in range(group * width + steps * 16, group * width + width):
                        byte, pair = array_at(codes + j, (1,), np.uint8)[0], array_at(out + j * 4, (2,), np.uint16)
                        pair[0] = rounded(np.float32(np.int32(byte & 15) - 8) * scale)
                        pair[1] = rounded(np.float32(np.int32(byte >> 4) - 8) * scale)

    return unpack
