"""Products of a few rows that are added up in the order of torch's own: the same bits, at the speed of memory.

Shapes: M rows of activations, I inputs, O outputs.

For bfloat16 torch asks oneDNN, whose kernels have one of two orders (`packed/exact.py` finds out which):

    in pairs     with AMX: of each 32 inputs the sum of the even ones, that of the odd ones, and both to the total
    in chunks    with AVX512-BF16: of each chunk of inputs, odd before even, a sum; and that to the total

Those instructions read denormal numbers as zero, and write zero for them, so here the same is switched on; not where
a chunk, or the bias, is added, which an ordinary addition does. What rounds to bfloat16 makes zeros of denormal numbers
too. A product of two bfloat16 is exact in float32, and each sum is rounded once. Sixteen outputs lie in the lanes of a
vector. The order is that of the instructions in Intel's manual (TDPBF16PS, VDPBF16PS, VCVTNEPS2BF16).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import llvmlite.binding as ll
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .pool import array_at, compiled, kernel, run, share
from .turning import ROWS, turn_words
from .vectors import F32, FLOATS, I32, I64, WORDS, lanes, load, moved, spread, store

STEP = 32  # inputs that are taken at once: a cache line of each row
ll.initialize_native_asmparser()  # for the one addition that is written down as instructions
FLUSH_DENORMALS = 0x8040  # bits of MXCSR: those that come in, and those that come out


class Sums:
    """The running sums of sixteen outputs for each of `tokens` rows, while code is generated. Until `write`, the code
    runs with denormals flushed."""

    def __init__(self, b: Any, tokens: int, paired: bool, x: Any, x_stride: Any):
        self.b, self.paired, self.tokens = b, paired, tokens
        self.x, self.x_stride = x, x_stride
        self.zero = lanes(FLOATS, 0.0)
        # A first chunk is the total as it is, were it -0; an AMX tile begins with 0.
        begin = lanes(FLOATS, 0.0 if paired else -0.0)
        self.totals = [cgutils.alloca_once_value(b, begin) for _ in range(tokens)]
        self.chunks = [cgutils.alloca_once_value(b, self.zero) for _ in range(tokens)]
        self.ordinary, self.flushing = cgutils.alloca_once(b, I32), cgutils.alloca_once(b, I32)
        _call_with_place(b, "llvm.x86.sse.stmxcsr", self.ordinary)
        b.store(b.or_(b.load(self.ordinary), I32(FLUSH_DENORMALS)), self.flushing)
        _call_with_place(b, "llvm.x86.sse.ldmxcsr", self.flushing)

    def add_step(self, step: Any, chunk: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
        """The weights of one step: sixteen pairs of an even and an odd input. `chunk` is so many steps."""
        b = self.b
        rows = [b.add(moved(b, self.x, step, 4 * STEP), b.mul(self.x_stride, I64(t))) for t in range(self.tokens)]
        for token, row in enumerate(rows):
            elements = [spread(b, FLOATS, load(b, F32, b.add(row, I64(4 * i)))) for i in range(STEP)]
            if self.paired:
                even = odd = self.zero
                for j, (first, second) in enumerate(pairs):
                    even = _multiply_add(b, first, elements[2 * j], even)
                    odd = _multiply_add(b, second, elements[2 * j + 1], odd)
                b.store(b.fadd(b.load(self.totals[token]), b.fadd(even, odd)), self.totals[token])
            else:
                total = b.load(self.chunks[token])
                for j, (first, second) in enumerate(pairs):
                    total = _multiply_add(b, second, elements[2 * j + 1], total)
                    total = _multiply_add(b, first, elements[2 * j], total)
                b.store(total, self.chunks[token])
        if not self.paired:
            ends = b.icmp_signed("==", b.srem(b.add(step, I64(1)), chunk), I64(0))
            with b.if_then(ends):
                self._close_chunks()

    def write(self, out: Any, out_stride: Any) -> None:
        if not self.paired:
            self._close_chunks()
        for token, total in enumerate(self.totals):
            store(self.b, self.b.load(total), self.b.add(out, self.b.mul(out_stride, I64(token))))
        _call_with_place(self.b, "llvm.x86.sse.ldmxcsr", self.ordinary)

    def _close_chunks(self) -> None:
        b = self.b
        for total, chunk in zip(self.totals, self.chunks, strict=True):
            b.store(self._add_ordinarily(b.load(total), b.load(chunk)), total)
            b.store(self.zero, chunk)

    def _add_ordinarily(self, one: Any, two: Any) -> Any:
        """With the caller's mode. In one piece: LLVM knows nothing of modes, and would move an addition across."""
        modes = [self.b.bitcast(place, cgutils.voidptr_t) for place in (self.ordinary, self.flushing)]
        kind = ir.FunctionType(FLOATS, [FLOATS, FLOATS, cgutils.voidptr_t, cgutils.voidptr_t])
        lines = "vldmxcsr ($3)\n\tvaddps $2, $1, $0\n\tvldmxcsr ($4)"
        return self.b.call(ir.InlineAsm(kind, lines, "=v,v,v,r,r,~{memory}", side_effect=True), [one, two, *modes])


def _multiply_add(b: Any, left: Any, right: Any, total: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f32"), [left, right, total])


def fetch(b: Any, address: Any) -> None:
    """Begin to bring a cache line into the second-level cache; any address may be asked for."""
    pointer = cgutils.voidptr_t
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    read, level_2, data = I32(0), I32(2), I32(1)
    b.call(function, [b.inttoptr(address, pointer), read, level_2, data])


@intrinsic(prefer_literal=True)
def add_up_tile(typingctx, paired, tokens, w, stride, ahead, x, x_stride, steps, chunk, out, out_stride):  # type: ignore[no-untyped-def]
    """Sixteen rows of bfloat16 at `w`, `stride` bytes apart, times x in float32; those at `ahead` are fetched."""
    constants = bool(paired.literal_value), tokens.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        w, stride, ahead, x, x_stride, steps, chunk, out, out_stride = args[2:]
        paired, tokens = constants
        sums = Sums(b, tokens, paired, x, x_stride)
        with cgutils.for_range(b, steps) as loop:
            places = [b.add(moved(b, w, loop.index, 2 * STEP), b.mul(stride, I64(row))) for row in range(ROWS)]
            words = [load(b, WORDS, place) for place in places]
            for place in places:
                fetch(b, b.add(place, b.sub(ahead, w)))
            sums.add_step(loop.index, chunk, [_widen_pair(b, column) for column in turn_words(b, words)])
        sums.write(out, out_stride)
        return context.get_dummy_value()

    return types.void(paired, tokens, *[types.int64] * 9), build


def _widen_pair(b: Any, words: Any) -> tuple[Any, Any]:
    """Two bfloat16 in each word as float32."""
    first, second = b.shl(words, lanes(WORDS, 16)), b.and_(words, lanes(WORDS, -0x10000))
    return b.bitcast(first, FLOATS), b.bitcast(second, FLOATS)


def _call_with_place(b: Any, name: str, place: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
    b.call(cgutils.get_or_insert_function(b.module, kind, name), [b.bitcast(place, cgutils.voidptr_t)])


@compiled
def rounded(number):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 that is nearest to a float32, the even one of two; of a denormal number, of zero."""
    bits = np.float32(number).view(np.uint32)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))  # NaN: rounded, it could be infinity, or zero
    if bits & np.uint32(0x7F800000) == np.uint32(0):
        return np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def write_rounded(sums, bias, out, stride):  # type: ignore[no-untyped-def]
    """Sums [M, 16], and the bias [16] at that address if it is not 0, as bfloat16; rows are `stride` elements apart."""
    for token in range(len(sums)):
        out_16 = array_at(out + 2 * token * stride, (ROWS,), np.uint16)
        for lane in range(ROWS):
            total = sums[token, lane]
            if bias != 0:
                bits = array_at(bias, (ROWS,), np.uint16)[lane]
                total += np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
            out_16[lane] = rounded(total)


def can_run() -> bool:
    """Whether this processor is of the kind that those orders belong to, and its vectors are as long."""
    return platform.machine().lower() in ("x86_64", "amd64") and bool(ll.get_host_cpu_features().get("avx512f"))


def multiply(
    x_MI: Tensor, weight_OI: Tensor, out_MO: Tensor, paired: bool, chunk: int, bias_O: Tensor | None = None
) -> None:
    """Write x @ W.T in that order of sums, and the bias added last. All bfloat16; `weight_OI` in one piece, as the
    bias; the outputs of a row side by side."""
    (tokens, inputs), outputs = x_MI.shape, len(weight_OI)
    x_float = x_MI.float().contiguous()
    where = (x_float.data_ptr(), weight_OI.data_ptr(), out_MO.data_ptr())
    bias = 0 if bias_O is None else bias_O.data_ptr()
    job = (*where, outputs, inputs, out_MO.stride(0), chunk // STEP, bias)
    run(_multiplier(paired, tokens), -(-outputs // ROWS), job, outputs * inputs)


@cache
def _multiplier(paired: bool, tokens: int) -> Any:
    """Compiled for each number of rows: their sums are registers."""

    @kernel
    def multiply_in_order(data):  # type: ignore[no-untyped-def]
        job, begin, end = share(data)
        x, weight, out, outputs, inputs, out_stride, chunk, bias = job[:8]
        row, sums = 2 * inputs, np.empty((tokens, ROWS), np.float32)
        for tile in range(begin, end):
            o = min(ROWS * tile, outputs - ROWS)  # the last tile may overlap the one before it
            w, ahead = weight + o * row, weight + min(o + ROWS, outputs - ROWS) * row
            add_up_tile(paired, tokens, w, row, ahead, x, 4 * inputs, inputs // STEP, chunk, sums.ctypes.data, 4 * ROWS)
            write_rounded(sums, bias + 2 * o if bias != 0 else 0, out + 2 * o, out_stride)

    return multiply_in_order
