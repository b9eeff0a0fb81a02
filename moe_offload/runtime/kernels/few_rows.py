"""Products of a few rows with bfloat16 matrices, on a CPU: each weight is read once, as fast as memory gives it.

Shapes: P rows of activations, S slots, I inputs, O outputs of one matrix.

    y[p] = bfloat16(sum over i of x[p, i] * W[slots[p]][:, i], products and sums in float32, + bias)

torch.mm packs a matrix for each product, which pays with many rows; with one it reaches a third of the memory's speed.
Here tiles of four rows of W meet two rows of x in registers, and while a tile is multiplied the next one is fetched.
All matrices of one call are one piece of work for torch's threads. A result depends on its own row of x and matrix
alone: not on the other rows, nor on the threads. It is not torch's to the bit: its sum has another order.
"""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ...packed.compiled.in_order.dense import rounded
from ...packed.compiled.pool import array_at, compiled, kernel, run, share

TILE = 4  # outputs at a time: so many streams from memory, and 16 accumulators of registers in flight
LINE = 64  # bytes of a cache line
FETCHED = 128  # pairs of inputs between two rounds of fetching, so that the loop over them stays a plain one
#: What may be done to float32 sums: another order, and fused products. NaN and infinity stay what they are.
SUMS = {"reassoc", "contract", "nsz"}


@intrinsic
def _fetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Begin to bring the cache line at `address` into the second-level cache; any address may be asked for."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32, pointer = ir.IntType(32), cgutils.voidptr_t
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, level_2, data = (ir.Constant(i32, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer), read, level_2, data])
        return context.get_dummy_value()

    return types.void(address), build


@compiled
def _low(pair):  # type: ignore[no-untyped-def]
    """The first of two bfloat16 that lie in 32 bits, as float32."""
    return np.uint32(pair << np.uint32(16)).view(np.float32)


@compiled
def _high(pair):  # type: ignore[no-untyped-def]
    """The second one."""
    return np.uint32(pair & np.uint32(0xFFFF0000)).view(np.float32)


@numba.njit(fastmath=SUMS, error_model="numpy")
def _multiply_tile(w, w_row, ahead, first, second, pairs):  # type: ignore[no-untyped-def]
    """Two rows of x, at `first` and `second`, times the TILE rows of W at `w`; the tile at `ahead` is fetched."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = np.float32(0)
    for begin in range(0, pairs, FETCHED):
        count, at = min(FETCHED, pairs - begin), 4 * begin
        for row in range(TILE):
            for line in range(0, 4 * count, LINE):
                _fetch(ahead + row * w_row + at + line)
        x0, x1 = array_at(first + at, (count,), np.uint32), array_at(second + at, (count,), np.uint32)
        wa, wb = array_at(w + at, (count,), np.uint32), array_at(w + w_row + at, (count,), np.uint32)
        wc, wd = array_at(w + 2 * w_row + at, (count,), np.uint32), array_at(w + 3 * w_row + at, (count,), np.uint32)
        for i in range(count):
            low0, high0, low1, high1 = _low(x0[i]), _high(x0[i]), _low(x1[i]), _high(x1[i])
            low, high = _low(wa[i]), _high(wa[i])
            a0 += low * low0 + high * high0
            a1 += low * low1 + high * high1
            low, high = _low(wb[i]), _high(wb[i])
            b0 += low * low0 + high * high0
            b1 += low * low1 + high * high1
            low, high = _low(wc[i]), _high(wc[i])
            c0 += low * low0 + high * high0
            c1 += low * low1 + high * high1
            low, high = _low(wd[i]), _high(wd[i])
            d0 += low * low0 + high * high0
            d1 += low * low1 + high * high1
    return (a0, b0, c0, d0), (a1, b1, c1, d1)


@kernel
def _multiply(data):  # type: ignore[no-untyped-def]
    """The rows of this job are tiles: those of the first run of equal slots, then those of the next."""
    job, begin, end = share(data)
    x, weight, slots_at, bias_at, out_at, slot_bytes, pairs, inputs, outputs = job[:9]
    slots_P, out_PO = array_at(slots_at, (pairs,), np.int64), array_at(out_at, (pairs, outputs), np.uint16)
    bias_O = array_at(bias_at, (outputs,), np.uint16)
    tiles, row = (outputs + TILE - 1) // TILE, 2 * inputs
    first, before = 0, 0  # of this run: its first pair, and how many tiles the runs before it have
    while first < pairs and before < end:
        last = first + 1
        while last < pairs and slots_P[last] == slots_P[first]:
            last += 1
        matrix = weight + slots_P[first] * slot_bytes
        for tile in range(max(begin - before, 0), min(end - before, tiles)):
            o = min(TILE * tile, outputs - TILE)  # the last tile may overlap the one before it
            ahead = matrix + min(o + TILE, outputs - TILE) * row
            for p in range(first, last, 2):
                q = min(p + 1, last - 1)
                sums_p, sums_q = _multiply_tile(matrix + o * row, row, ahead, x + p * row, x + q * row, inputs // 2)
                for t in range(TILE):
                    bias = np.float32(0) if bias_at == 0 else _low(np.uint32(bias_O[o + t]))
                    out_PO[p, o + t], out_PO[q, o + t] = rounded(sums_p[t] + bias), rounded(sums_q[t] + bias)
        first, before = last, before + tiles


def compile_kernels() -> None:
    """Compile the kernel now and not in the middle of a call. It is kept on disk where there is a folder for it."""
    _multiply.address  # noqa: B018


def can_multiply(x_PI: Tensor, weight_SOI: Tensor) -> bool:
    """Whether `multiply_rows` takes these: bfloat16 on a CPU, rows in one piece, of an even number of inputs."""
    outputs, inputs = weight_SOI.shape[1:]
    return (
        x_PI.dtype == torch.bfloat16 == weight_SOI.dtype
        and x_PI.device.type == "cpu" == weight_SOI.device.type
        and x_PI.shape[1] == inputs
        and inputs % 2 == 0
        and outputs >= TILE
        and x_PI.is_contiguous()
        and weight_SOI.stride()[1:] == (inputs, 1)
        and not (x_PI.is_neg() or weight_SOI.is_neg())
    )


def multiply_grouped(x_PI: Tensor, weight_SOI: Tensor, slots_P: Tensor) -> Tensor:
    """`[P, O]`: each row of x times the matrix in its slot, which neighbours with equal slots read once.

    For what `can_multiply` takes; the slots are there.
    """
    slots = slots_P.tolist()
    runs = 1 + sum(one != other for one, other in pairwise(slots))
    slot_bytes = 2 * weight_SOI.stride(0)
    return _run(x_PI, weight_SOI, weight_SOI.shape[1], torch.tensor(slots, device="cpu"), runs, slot_bytes, None)


def multiply_rows(x_PI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`[P, O]`: rows of x times one matrix, as `nn.Linear` has it; all in one piece, I even and O at least TILE."""
    return _run(x_PI, weight_OI, weight_OI.shape[0], x_PI.new_zeros(len(x_PI), dtype=torch.int64), 1, 0, bias_O)


def _run(
    x_PI: Tensor, weight: Tensor, outputs: int, slots_P: Tensor, runs: int, slot_bytes: int, bias_O: Tensor | None
) -> Tensor:
    pairs, inputs = x_PI.shape
    out_PO = x_PI.new_empty((pairs, outputs))
    bias_at = 0 if bias_O is None else bias_O.data_ptr()
    addresses = [x_PI.data_ptr(), weight.data_ptr(), slots_P.data_ptr(), bias_at, out_PO.data_ptr()]
    run(
        _multiply, runs * -(-outputs // TILE), [*addresses, slot_bytes, pairs, inputs, outputs], runs * outputs * inputs
    )
    return out_PO
