"""The running sums of a product, in torch's order, as code that is generated.

Shapes: M rows of activations, I inputs, O outputs.

For bfloat16 torch asks oneDNN, whose kernels have one of two orders (`packed/exact.py` finds out which):

    in pairs     with AMX: of each 32 inputs the sum of the even ones, that of the odd ones, and both to the total
    in chunks    with AVX512-BF16: of each chunk of inputs, odd before even, a sum; and that to the total

The second is what the instruction VDPBF16PS does, which is used here too. The first is made up of multiplications and
additions, which must read denormal numbers as zero, and write zero for them, as the instructions of AMX do: that is
switched on meanwhile. A product of two bfloat16 is exact in float32, and each sum is rounded once. Sixteen outputs lie
in the lanes of a vector, each with two of its weights. The order is that of the instructions in Intel's manual
(TDPBF16PS, VDPBF16PS).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as ll
from llvmlite import ir
from numba.core import cgutils

from ..vectors import F32, FLOATS, I32, I64, WORDS, lanes, load, moved, spread, store

STEP = 32  # inputs that are taken at once: a cache line of each row
ll.initialize_native_asmparser()  # for the instruction that is written down as it is
FLUSH_DENORMALS = 0x8040  # bits of MXCSR: those that come in, and those that come out


class Sums:
    """The running sums of sixteen outputs for each of `tokens` rows, while code is generated.

    `x` is bfloat16 to sums in chunks, and float32 to those in pairs, which are made while denormals are flushed.
    """

    def __init__(self, b: Any, tokens: int, paired: bool, x: Any, x_stride: Any):
        self.b, self.paired, self.tokens = b, paired, tokens
        self.x, self.x_stride = x, x_stride
        self.zero = lanes(FLOATS, 0.0)
        # A first chunk is the total as it is, were it -0; an AMX tile begins with 0.
        first = lanes(FLOATS, 0.0 if paired else -0.0)
        self.totals = [cgutils.alloca_once_value(b, first) for _ in range(tokens)]
        self.chunks = [cgutils.alloca_once_value(b, self.zero) for _ in range(tokens)]

    def add_step(self, step: Any, pairs: Sequence[Any]) -> None:
        """The weights of one step: sixteen vectors of an even and, above it, an odd input of each output."""
        b = self.b
        row_bytes = STEP * (4 if self.paired else 2)
        for token in range(self.tokens):
            row = b.add(moved(b, self.x, step, row_bytes), b.mul(self.x_stride, I64(token)))
            if self.paired:
                even = odd = self.zero
                for j, (first, second) in enumerate(_widen_pair(b, words) for words in pairs):
                    even = _multiply_add(b, first, self._element(row, 2 * j), even)
                    odd = _multiply_add(b, second, self._element(row, 2 * j + 1), odd)
                b.store(b.fadd(b.load(self.totals[token]), b.fadd(even, odd)), self.totals[token])
            else:
                total = b.load(self.chunks[token])
                for j, words in enumerate(pairs):
                    elements = spread(b, WORDS, load(b, I32, b.add(row, I64(4 * j))))
                    total = _multiply_add_pairs(b, words, elements, total)
                b.store(total, self.chunks[token])

    def close_chunk(self) -> None:
        """After the last step of a chunk, which may be the last of all: a chunk more, of 0, would make 0 of -0."""
        if not self.paired:
            for total, chunk in zip(self.totals, self.chunks, strict=True):
                self.b.store(self.b.fadd(self.b.load(total), self.b.load(chunk)), total)
                self.b.store(self.zero, chunk)

    def write(self, out: Any, out_stride: Any) -> None:
        for token, total in enumerate(self.totals):
            store(self.b, self.b.load(total), self.b.add(out, self.b.mul(out_stride, I64(token))))

    def _element(self, row: Any, index: int) -> Any:
        return spread(self.b, FLOATS, load(self.b, F32, self.b.add(row, I64(4 * index))))


@contextmanager
def denormals_flushed(b: Any, wanted: bool) -> Iterator[None]:
    """Code that reads denormal numbers as zero, and writes zero for them, if `wanted`."""
    if not wanted:
        yield
        return
    ordinary, flushing = cgutils.alloca_once(b, I32), cgutils.alloca_once(b, I32)
    _call_with_place(b, "llvm.x86.sse.stmxcsr", ordinary)
    b.store(b.or_(b.load(ordinary), I32(FLUSH_DENORMALS)), flushing)
    _call_with_place(b, "llvm.x86.sse.ldmxcsr", flushing)
    yield
    _call_with_place(b, "llvm.x86.sse.ldmxcsr", ordinary)


def at_end_of_chunk(b: Any, step: Any, chunk: Any, steps: Any) -> Any:
    """A branch for what follows the last step of a chunk, which is so many steps, or the last of all `steps`."""
    done = b.add(step, I64(1))
    whole = b.icmp_signed("==", b.srem(done, chunk), I64(0))
    return b.if_then(b.or_(whole, b.icmp_signed("==", done, steps)))


def _multiply_add(b: Any, left: Any, right: Any, total: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f32"), [left, right, total])


def _multiply_add_pairs(b: Any, left: Any, right: Any, total: Any) -> Any:
    """VDPBF16PS, by its name: what LLVM calls it depends on whether that version has a type for bfloat16."""
    kind = ir.FunctionType(FLOATS, [FLOATS, WORDS, WORDS])
    return b.call(ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v"), [total, left, right])


def _widen_pair(b: Any, words: Any) -> tuple[Any, Any]:
    """Two bfloat16 in each word as float32."""
    first, second = b.shl(words, lanes(WORDS, 16)), b.and_(words, lanes(WORDS, -0x10000))
    return b.bitcast(first, FLOATS), b.bitcast(second, FLOATS)


def _call_with_place(b: Any, name: str, place: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
    b.call(cgutils.get_or_insert_function(b.module, kind, name), [b.bitcast(place, cgutils.voidptr_t)])
