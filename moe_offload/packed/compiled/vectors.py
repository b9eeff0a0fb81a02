"""The vector instructions of one step of each kernel, written in LLVM's own terms.

Compiled from Python loops the same steps are slower: numba widens 32-bit numbers to 64, and checks at each step whether
arrays overlap. The vectors here are of types that LLVM has on every processor (16 lanes of 32 bits, 32 of 16); it cuts
them to the processor's width.
A processor with AVX512BW looks sixteen values up at once, three times as fast; elsewhere the same bits are computed.
An address is an int64; loads and stores need no alignment. Rounding to bfloat16 is to nearest even, in integers: the
instructions that round flush denormals to zero, and torch does not.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
I64 = ir.IntType(64)
BYTES, BYTES_32 = ir.VectorType(I8, 16), ir.VectorType(I8, 32)
WORDS, FLOATS = ir.VectorType(I32, 16), ir.VectorType(F32, 16)
HALVES, HALVES_16 = ir.VectorType(I16, 32), ir.VectorType(I16, 16)
STEPS = types.void(types.int64, types.int64, types.float32, types.int64)  # codes, steps, scale, out


def splat_constant(kind: Any, value: float) -> Any:
    """A vector with the same constant in every lane."""
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def splat_value(b: Any, kind: Any, value: Any) -> Any:
    """A vector with the same run-time value in every lane."""
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), splat_constant(ir.VectorType(I32, kind.count), 0))


def load_at(b: Any, kind: Any, address: Any) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def store_at(b: Any, value: Any, address: Any) -> Any:
    return b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def element_address(b: Any, address: Any, index: Any, stride: int) -> Any:
    """The address of element `index`."""
    return b.add(address, b.mul(index, ir.Constant(index.type, stride)))


def can_look_up(context: Any) -> bool:
    """Whether the code is compiled for a processor that permutes 16-bit lanes."""
    return "+avx512bw" in str(context.codegen().magic_tuple())


def repeat_table(b: Any, table: Any) -> Any:
    """A table of sixteen entries twice, because the instruction looks up in 32: it reads five bits of an index."""
    numbers = ir.Constant(ir.VectorType(I32, 32), [ir.Constant(I32, n % 16) for n in range(32)])
    return b.shuffle_vector(table, ir.Constant(table.type, ir.Undefined), numbers)


def look_up(b: Any, table: Any, index: Any) -> Any:
    kind = ir.FunctionType(HALVES, [HALVES, HALVES])
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.hi.512"), [table, index])


def round_to_bfloat16(b: Any, floats: Any) -> Any:
    """The bits of float32s, rounded: the upper half of each is the nearest bfloat16, the lower half means nothing."""
    bits = b.bitcast(floats, WORDS)
    odd = b.and_(b.lshr(bits, splat_constant(WORDS, 16)), splat_constant(WORDS, 1))
    return b.add(b.add(bits, splat_constant(WORDS, 0x7FFF)), odd)


def table_of(b: Any, floats: Any) -> Any:
    """The nearest bfloat16 of sixteen float32, as a table that is there twice (see `repeat_table`)."""
    upper = ir.Constant(ir.VectorType(I32, 32), [ir.Constant(I32, n % 16 * 2 + 1) for n in range(32)])
    return b.shuffle_vector(b.bitcast(round_to_bfloat16(b, floats), HALVES), ir.Constant(HALVES, ir.Undefined), upper)


def load_nibbles(b: Any, address: Any) -> Any:
    """Sixteen bytes as 32 numbers of 16 bits: low nibble, high nibble, and so on."""
    word = b.zext(load_at(b, BYTES, address), WORDS)
    pair = b.and_(b.or_(word, b.shl(word, splat_constant(WORDS, 12))), splat_constant(WORDS, 0x000F000F))
    return b.bitcast(pair, HALVES)


@intrinsic
def expand_mxfp4(typingctx, codes, scale, table, out):  # type: ignore[no-untyped-def]
    """A group of 32 codes under a scale of 2 to 251; `table` has the sixteen values under that scale.

    Computed: magnitudes 2 to 7 have the bits (scale - 1) * 128 + magnitude * 64, magnitude 1 has those of the power
    alone, and 0 has none.
    """

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, scale, table, out = args
        code = load_nibbles(b, codes)
        if can_look_up(context):
            store_at(b, look_up(b, repeat_table(b, load_at(b, HALVES_16, table)), code), out)
            return
        power = splat_value(b, HALVES, b.shl(b.sub(b.trunc(scale, I16), ir.Constant(I16, 1)), ir.Constant(I16, 7)))
        magnitude, none = b.and_(code, splat_constant(HALVES, 7)), splat_constant(HALVES, 0)
        large = b.icmp_unsigned(">", magnitude, splat_constant(HALVES, 1))
        bits = b.add(power, b.select(large, b.shl(magnitude, splat_constant(HALVES, 6)), none))
        bits = b.select(b.icmp_unsigned("!=", magnitude, none), bits, none)
        store_at(b, b.or_(bits, b.shl(b.and_(code, splat_constant(HALVES, 8)), splat_constant(HALVES, 12))), out)

    return types.void(types.int64, types.int64, types.int64, types.int64), build


@intrinsic
def expand_fp8(typingctx, codes, steps, scale, out):  # type: ignore[no-untyped-def]
    """So many steps of 32 codes under a scale of 2^-100 to 2^100. A code is a sign, four bits of exponent, three more.

    A code without exponent bits is a multiple of 2^-9. Any other is the value with the same three bits and exponent 0,
    as if that were a normal one, and then the exponent is added to the bits. Both kinds are sixteen values.
    """

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, steps, scale, out = args
        scale = splat_value(b, FLOATS, scale)
        values = [2.0**-7 * (1 + n / 8) for n in range(8)] + [2.0**-9 * n for n in range(8)]
        values = ir.Constant(FLOATS, [ir.Constant(F32, value) for value in values])
        table = table_of(b, b.fmul(values, scale)) if can_look_up(context) else None
        with cgutils.for_range(b, steps) as loop:
            source, target = element_address(b, codes, loop.index, 32), element_address(b, out, loop.index, 64)
            if table is not None:
                store_at(b, _fp8_looked_up(b, b.zext(load_at(b, BYTES_32, source), HALVES), table), target)
            else:
                two = [
                    _fp8_computed(b, load_at(b, BYTES, element_address(b, source, half, 16)), scale)
                    for half in (I64(0), I64(1))
                ]
                store_at(b, b.shuffle_vector(*two, ir.Constant(ir.VectorType(I32, 32), list(range(32)))), target)

    return STEPS, build


def _fp8_looked_up(b: Any, code: Any, table: Any) -> Any:
    exponent, last = b.and_(code, splat_constant(HALVES, 0x78)), b.and_(code, splat_constant(HALVES, 7))
    none = b.icmp_unsigned("==", exponent, splat_constant(HALVES, 0))
    value = look_up(b, table, b.select(none, b.or_(last, splat_constant(HALVES, 8)), last))
    sign = b.shl(b.and_(code, splat_constant(HALVES, 0x80)), splat_constant(HALVES, 8))
    return b.xor(b.add(value, b.shl(exponent, splat_constant(HALVES, 4))), sign)


def _fp8_computed(b: Any, code: Any, scale: Any) -> Any:
    code = b.zext(code, WORDS)
    magnitude = b.and_(code, splat_constant(WORDS, 0x7F))
    small = b.fmul(b.sitofp(magnitude, FLOATS), splat_constant(FLOATS, 2.0**-9))
    normal = b.bitcast(b.add(b.shl(magnitude, splat_constant(WORDS, 20)), splat_constant(WORDS, 120 << 23)), FLOATS)
    value = b.select(b.icmp_unsigned("<", magnitude, splat_constant(WORDS, 8)), small, normal)
    bits = b.lshr(round_to_bfloat16(b, b.fmul(value, scale)), splat_constant(WORDS, 16))
    return b.trunc(b.xor(bits, b.shl(b.and_(code, splat_constant(WORDS, 0x80)), splat_constant(WORDS, 8))), HALVES_16)


@intrinsic
def expand_int4(typingctx, codes, steps, scale, out):  # type: ignore[no-untyped-def]
    """So many steps of 32 codes, each plus 8, in sixteen bytes, under one scale."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, steps, scale, out = args
        scale, table = splat_value(b, FLOATS, scale), None
        if can_look_up(context):
            values = ir.Constant(FLOATS, [ir.Constant(F32, float(n - 8)) for n in range(16)])
            table = table_of(b, b.fmul(values, scale))
        with cgutils.for_range(b, steps) as loop:
            source, target = element_address(b, codes, loop.index, 16), element_address(b, out, loop.index, 64)
            if table is not None:
                store_at(b, look_up(b, table, load_nibbles(b, source)), target)
            else:
                store_at(b, _int4_computed(b, b.zext(load_at(b, BYTES, source), WORDS), scale), target)

    return STEPS, build


def _int4_computed(b: Any, code: Any, scale: Any) -> Any:
    pair = []
    for part in (b.and_(code, splat_constant(WORDS, 15)), b.lshr(code, splat_constant(WORDS, 4))):
        pair.append(round_to_bfloat16(b, b.fmul(b.sitofp(b.sub(part, splat_constant(WORDS, 8)), FLOATS), scale)))
    return b.or_(b.lshr(pair[0], splat_constant(WORDS, 16)), b.and_(pair[1], splat_constant(WORDS, -0x10000)))
