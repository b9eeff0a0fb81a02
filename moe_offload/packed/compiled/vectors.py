"""One step of each kernel, on vectors: what numba does not say, and LLVM does not find by itself.

Numba makes 64-bit numbers of 32-bit ones, and checks at each step whether arrays overlap, so the vectors are written
down here, in types that LLVM has on every processor (16 lanes of 32 bits, 32 of 16): it cuts them to what there is.
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
FLOAT32, BFLOAT16, EXPONENT = range(3)  # kinds of scales
STEPS = types.void(types.int64, types.int64, types.float32, types.int64)  # codes, steps, scale, out


def lanes(kind: Any, value: float) -> Any:
    """The same number in every lane."""
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def spread(b: Any, kind: Any, value: Any) -> Any:
    """A number that is not known before in every lane."""
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes(ir.VectorType(I32, kind.count), 0))


def load(b: Any, kind: Any, address: Any) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def store(b: Any, value: Any, address: Any) -> Any:
    return b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def moved(b: Any, address: Any, index: Any, stride: int) -> Any:
    """The address of element `index`."""
    return b.add(address, b.mul(index, ir.Constant(index.type, stride)))


def fetch(b: Any, address: Any) -> None:
    """Begin to bring a cache line into the second-level cache; any address may be asked for."""
    pointer = cgutils.voidptr_t
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    read, level_2, data = I32(0), I32(2), I32(1)
    b.call(function, [b.inttoptr(address, pointer), read, level_2, data])


def load_scale(b: Any, kind: int, scales: Any, index: Any) -> Any:
    """One scale as float32; of the powers of two, the first is denormal."""
    if kind == FLOAT32:
        return load(b, F32, moved(b, scales, index, 4))
    if kind == BFLOAT16:
        return b.bitcast(b.shl(b.zext(load(b, I16, moved(b, scales, index, 2)), I32), I32(16)), F32)
    exponent = b.zext(load(b, I8, b.add(scales, index)), I32)
    bits = b.select(b.icmp_unsigned("==", exponent, I32(0)), I32(1 << 22), b.shl(exponent, I32(23)))
    return b.bitcast(bits, F32)


def can_look_up(context: Any) -> bool:
    """Whether the code is compiled for a processor that permutes 16-bit lanes."""
    return "+avx512bw" in str(context.codegen().magic_tuple())


def twice(b: Any, table: Any) -> Any:
    """Sixteen entries as the 32 that the instruction looks up in: five bits of an index count."""
    numbers = ir.Constant(ir.VectorType(I32, 32), [ir.Constant(I32, n % 16) for n in range(32)])
    return b.shuffle_vector(table, ir.Constant(table.type, ir.Undefined), numbers)


def look_up(b: Any, table: Any, index: Any) -> Any:
    kind = ir.FunctionType(HALVES, [HALVES, HALVES])
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.hi.512"), [table, index])


def round_up(b: Any, floats: Any) -> Any:
    """Bits of float32 of which the upper half is the nearest bfloat16; the lower half is nothing."""
    bits = b.bitcast(floats, WORDS)
    odd = b.and_(b.lshr(bits, lanes(WORDS, 16)), lanes(WORDS, 1))
    return b.add(b.add(bits, lanes(WORDS, 0x7FFF)), odd)


def table_of(b: Any, floats: Any) -> Any:
    """The nearest bfloat16 of sixteen float32, twice: five bits of an index count, and the fifth may be anything."""
    upper = ir.Constant(ir.VectorType(I32, 32), [ir.Constant(I32, n % 16 * 2 + 1) for n in range(32)])
    return b.shuffle_vector(b.bitcast(round_up(b, floats), HALVES), ir.Constant(HALVES, ir.Undefined), upper)


def nibbles(b: Any, address: Any) -> Any:
    """Sixteen bytes as 32 numbers of 16 bits: low nibble, high nibble, and so on."""
    word = b.zext(load(b, BYTES, address), WORDS)
    pair = b.and_(b.or_(word, b.shl(word, lanes(WORDS, 12))), lanes(WORDS, 0x000F000F))
    return b.bitcast(pair, HALVES)


@intrinsic
def expand_mxfp4(typingctx, codes, scale, table, out):  # type: ignore[no-untyped-def]
    """A group of 32 codes under a scale of 2 to 251; `table` has the sixteen values under that scale."""

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, scale, table, out = args
        code = nibbles(b, codes)
        if can_look_up(context):
            store(b, look_up(b, twice(b, load(b, HALVES_16, table)), code), out)
            return
        power = b.shl(b.sub(b.trunc(scale, I16), ir.Constant(I16, 1)), ir.Constant(I16, 7))
        store(b, mxfp4_value(b, code, spread(b, HALVES, power)), out)

    return types.void(types.int64, types.int64, types.int64, types.int64), build


def mxfp4_value(b: Any, code: Any, power: Any) -> Any:
    """Of 32 codes; `power` is (scale - 1) * 128, of a scale of 2 to 251 for each. Magnitudes 2 to 7 have the bits
    power + magnitude * 64, magnitude 1 has those of the power alone, and 0 has none."""
    magnitude, none = b.and_(code, lanes(HALVES, 7)), lanes(HALVES, 0)
    large = b.icmp_unsigned(">", magnitude, lanes(HALVES, 1))
    bits = b.add(power, b.select(large, b.shl(magnitude, lanes(HALVES, 6)), none))
    bits = b.select(b.icmp_unsigned("!=", magnitude, none), bits, none)
    return b.or_(bits, b.shl(b.and_(code, lanes(HALVES, 8)), lanes(HALVES, 12)))


@intrinsic
def expand_fp8(typingctx, codes, steps, scale, out):  # type: ignore[no-untyped-def]
    """So many steps of 32 codes under a scale of 2^-100 to 2^100. A code is a sign, four bits of exponent, three more.

    A code without exponent bits is a multiple of 2^-9. Any other is the value with the same three bits and exponent 0,
    as if that were a normal one, and then the exponent is added to the bits. Both kinds are sixteen values.
    """

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, steps, scale, out = args
        table = table_of_fp8(b, scale) if can_look_up(context) else None
        scale = spread(b, FLOATS, scale)
        with cgutils.for_range(b, steps) as loop:
            source, target = moved(b, codes, loop.index, 32), moved(b, out, loop.index, 64)
            if table is not None:
                store(b, fp8_looked_up(b, b.zext(load(b, BYTES_32, source), HALVES), table), target)
            else:
                two = [_fp8_computed(b, load(b, BYTES, moved(b, source, half, 16)), scale) for half in (I64(0), I64(1))]
                store(b, b.shuffle_vector(*two, ir.Constant(ir.VectorType(I32, 32), list(range(32)))), target)

    return STEPS, build


def table_of_fp8(b: Any, scale: Any) -> Any:
    """Under one scale: the values of the last three bits with exponent 0 as if it were that of a normal one, and those
    without exponent bits."""
    values = [2.0**-7 * (1 + n / 8) for n in range(8)] + [2.0**-9 * n for n in range(8)]
    return table_of(
        b, b.fmul(ir.Constant(FLOATS, [ir.Constant(F32, value) for value in values]), spread(b, FLOATS, scale))
    )


def fp8_looked_up(b: Any, code: Any, table: Any) -> Any:
    """The bits of bfloat16 of 32 codes."""
    exponent, last = b.and_(code, lanes(HALVES, 0x78)), b.and_(code, lanes(HALVES, 7))
    none = b.icmp_unsigned("==", exponent, lanes(HALVES, 0))
    value = look_up(b, table, b.select(none, b.or_(last, lanes(HALVES, 8)), last))
    sign = b.shl(b.and_(code, lanes(HALVES, 0x80)), lanes(HALVES, 8))
    return b.xor(b.add(value, b.shl(exponent, lanes(HALVES, 4))), sign)


def _fp8_computed(b: Any, code: Any, scale: Any) -> Any:
    code = b.zext(code, WORDS)
    magnitude = b.and_(code, lanes(WORDS, 0x7F))
    small = b.fmul(b.sitofp(magnitude, FLOATS), lanes(FLOATS, 2.0**-9))
    normal = b.bitcast(b.add(b.shl(magnitude, lanes(WORDS, 20)), lanes(WORDS, 120 << 23)), FLOATS)
    value = b.select(b.icmp_unsigned("<", magnitude, lanes(WORDS, 8)), small, normal)
    bits = b.lshr(round_up(b, b.fmul(value, scale)), lanes(WORDS, 16))
    return b.trunc(b.xor(bits, b.shl(b.and_(code, lanes(WORDS, 0x80)), lanes(WORDS, 8))), HALVES_16)


@intrinsic(prefer_literal=True)
def expand_int4(typingctx, kind, codes, scales, groups, steps, group_bytes, out):  # type: ignore[no-untyped-def]
    """A row of so many groups, each of so many steps of 32 codes, each plus 8, in sixteen bytes, under one scale.

    `kind` (of a scale) is a constant; `group_bytes` are those from group to group. One loop for the whole row: with one
    step a group, a call for each took longer than the step.
    """
    constant = kind.literal_value

    def build(context, b, signature, args):  # type: ignore[no-untyped-def]
        codes, scales, groups, steps, group_bytes, out = args[1:]
        values = ir.Constant(FLOATS, [ir.Constant(F32, float(n - 8)) for n in range(16)])
        with cgutils.for_range(b, groups) as group:
            scale = spread(b, FLOATS, load_scale(b, constant, scales, group.index))
            table = table_of(b, b.fmul(values, scale)) if can_look_up(context) else None
            first = b.mul(group.index, group_bytes)
            with cgutils.for_range(b, steps) as loop:
                place = b.add(first, b.mul(loop.index, I64(16)))
                source, target = b.add(codes, place), b.add(out, b.mul(place, I64(4)))
                if table is not None:
                    store(b, look_up(b, table, nibbles(b, source)), target)
                else:
                    store(b, _int4_computed(b, b.zext(load(b, BYTES, source), WORDS), scale), target)

    return types.void(kind, *[types.int64] * 6), build


def _int4_computed(b: Any, code: Any, scale: Any) -> Any:
    pair = []
    for part in (b.and_(code, lanes(WORDS, 15)), b.lshr(code, lanes(WORDS, 4))):
        pair.append(round_up(b, b.fmul(b.sitofp(b.sub(part, lanes(WORDS, 8)), FLOATS), scale)))
    return b.or_(b.lshr(pair[0], lanes(WORDS, 16)), b.and_(pair[1], lanes(WORDS, -0x10000)))
