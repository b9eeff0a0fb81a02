"""MXFP4 to bfloat16, and turned on the way: codes [O, I/2] become [I, O], as gpt-oss has its experts.

The codes are turned, a quarter of the bytes, in registers; then 32 rows of a column are unpacked at once, each lane
under the scale of its own row. A thread takes some columns and goes through all rows: it writes to few pages at a time,
each from its beginning to its end. Where they are aligned, whole cache lines are written past the cache: to fetch each
of them first, from as many places as there are columns, took as long as everything else.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .pool import array_at, compiled, kernel, run, share
from .vectors import BYTES, HALVES, I32, I64, lanes, load, mxfp4_value, store

LINE = 64  # bytes of a cache line, and of a column that is written at once
ROWS = 32  # that are turned at once
GROUPS = 4  # of columns: their codes are one cache line of a row


def unpack_mxfp4_turned(codes: Tensor, scales: Tensor, table: Tensor, out_IO: Tensor) -> None:
    """`table` [256, 16]: the values of the sixteen codes under each scale, in bfloat16."""
    outputs, groups = scales.shape
    job = (codes.data_ptr(), scales.data_ptr(), out_IO.data_ptr(), outputs, groups, out_IO.stride(0), table.data_ptr())
    aligned = out_IO.data_ptr() % LINE == 0 and out_IO.stride(0) * 2 % LINE == 0
    run(_turned_in_lines if aligned else _turned, -(-groups // GROUPS), job, out_IO.numel())


@kernel
def _turned(data):  # type: ignore[no-untyped-def]
    _turn_share(data, False)


@kernel
def _turned_in_lines(data):  # type: ignore[no-untyped-def]
    _turn_share(data, True)
    fence()  # what was written past the cache, before another thread is told that it is there


@numba.njit(inline="always")
def _turn_share(data, aligned):  # type: ignore[no-untyped-def]
    job, begin, end = share(data)
    outputs, groups, stride, table = job[3], job[4], job[5], job[6]
    powers = np.empty(ROWS, np.uint16)
    whole = outputs // ROWS * ROWS
    for some in range(begin, end):
        columns = range(some * GROUPS, min(some * GROUPS + GROUPS, groups))
        for row in range(0, whole, ROWS):
            for group in columns:
                codes, scales = job[0] + (row * groups + group) * 16, job[1] + row * groups + group
                out = job[2] + (group * 32 * stride + row) * 2
                if _take_powers(scales, groups, powers):
                    if aligned:
                        turn_mxfp4(True, codes, groups * 16, powers.ctypes.data, out, stride * 2)
                    else:
                        turn_mxfp4(False, codes, groups * 16, powers.ctypes.data, out, stride * 2)
                else:
                    _singly(codes, scales, groups, table, out, stride, ROWS)
        for group in columns:
            codes, scales = job[0] + (whole * groups + group) * 16, job[1] + whole * groups + group
            _singly(codes, scales, groups, table, job[2] + (group * 32 * stride + whole) * 2, stride, outputs - whole)


@compiled
def _take_powers(scales, groups, powers):  # type: ignore[no-untyped-def]
    """The exponents of 32 rows in the place where bfloat16 has them, less one; False where a result may be denormal or
    infinite, which goes by the table."""
    every = array_at(scales, (groups * (ROWS - 1) + 1,), np.uint8)
    least, most = np.uint8(255), np.uint8(0)
    for row in range(ROWS):
        scale = every[row * groups]
        least, most = min(least, scale), max(most, scale)
        powers[row] = np.uint16((np.uint16(scale) - np.uint16(1)) << np.uint16(7))
    return least >= 2 and most <= 251


@compiled
def _singly(codes, scales, groups, table, out, stride, rows):  # type: ignore[no-untyped-def]
    """One group of columns of so many rows."""
    for row in range(rows):
        scale = array_at(scales + row * groups, (1,), np.uint8)[0]
        values = array_at(table + np.int64(scale) * 32, (16,), np.uint16)
        bytes_J = array_at(codes + row * groups * 16, (16,), np.uint8)
        for j in range(16):
            array_at(out + (2 * j * stride + row) * 2, (1,), np.uint16)[0] = values[bytes_J[j] & 15]
            array_at(out + ((2 * j + 1) * stride + row) * 2, (1,), np.uint16)[0] = values[bytes_J[j] >> 4]


@intrinsic
def fence(typingctx):  # type: ignore[no-untyped-def]
    """Nothing of this thread moves across it."""
    return types.void(), lambda context, b, signature, args: b.fence("seq_cst")


@intrinsic(prefer_literal=True)
def turn_mxfp4(typingctx, aligned, codes, codes_stride, powers, out, out_stride):  # type: ignore[no-untyped-def]
    """32 rows of one group of codes to 32 columns: [32, 16] bytes to [32, 32] bfloat16. Strides are bytes; `aligned`, a
    constant, says that each column is a cache line."""
    in_lines = aligned.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, codes_stride, powers, out, out_stride = args[1:]
        power = load(b, HALVES, powers)
        rows = [load(b, BYTES, b.add(codes, b.mul(codes_stride, I64(row)))) for row in range(ROWS)]
        halves = _transpose(b, rows[:16]), _transpose(b, rows[16:])
        for byte, (first, second) in enumerate(zip(*halves, strict=True)):
            pair = b.zext(_shuffled(b, first, second, range(32)), HALVES)
            for nibble, code in enumerate((b.and_(pair, lanes(HALVES, 15)), b.lshr(pair, lanes(HALVES, 4)))):
                place = b.add(out, b.mul(out_stride, I64(2 * byte + nibble)))
                written = store(b, mxfp4_value(b, code, power), place)
                if in_lines:
                    written.align = LINE
                    written.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    return types.void(aligned, *[types.int64] * 5), build


def _transpose(b: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen bytes. A step moves the upper bit of a row's number to the lower end of the column's,
    and the upper bit of the column's to that of the row's: after four, the two numbers have changed places."""
    for _ in range(4):
        pairs = [(rows[n], rows[n + 8]) for n in range(8)]
        rows = [
            _shuffled(b, *pair, [k for n in range(first, first + 8) for k in (n, n + 16)])
            for pair in pairs
            for first in (0, 8)
        ]
    return rows


def _shuffled(b: Any, first: Any, second: Any, order: Any) -> Any:
    order = list(order)
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(order)), [I32(n) for n in order]))
