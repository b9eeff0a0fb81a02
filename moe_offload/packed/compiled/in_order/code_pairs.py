"""Codes of sixteen rows, turned, to weights in bfloat16: a vector holds an even and an odd input of every row.

A weight is the one that unpacking makes: a code's value times its scale, rounded to bfloat16, to nearest even.

    by floats      the value is looked up, multiplied by the scale of its row, and rounded by the processor: int4, FP8
    by patterns    the bits of the weight are looked up, and the exponent is added to them: MXFP4, whose scales are
                   powers of two, and FP8 where the scale of all sixteen rows is the same

`VCVTNE2PS2BF16` packs what lies in two vectors one after the other, so there a vector has even and odd inputs of eight
rows in turn. Denormal numbers are zero to it: scales so small are not for these kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from ..dot import FP8, INT4, MXFP4, VALUES, fp8_value, int4_value
from ..vectors import (
    F32,
    FLOATS,
    HALVES,
    HALVES_16,
    I8,
    I16,
    I32,
    I64,
    WORDS,
    fp8_looked_up,
    lanes,
    load,
    look_up,
    table_of_fp8,
    twice,
)

CODE_BITS = {MXFP4: 4, FP8: 8, INT4: 4}
ROWS = 16
LINE = 64
#: What the scales of sixteen rows in one group are turned into, in bytes: sixteen words, those of two vectors of floats
#: in which each row comes twice, or one float.
POWERS, EACH_TWICE, SHARED = LINE, 2 * LINE, 4


def scale_bytes(form: int, shared: bool) -> int:
    """What the scales of a group take, as `weigh` takes them."""
    if form == MXFP4:
        return POWERS
    return SHARED if shared else EACH_TWICE


def load_scale(b: Any, form: int, shared: bool, place: Any) -> Any:
    """The scales of a group, for `weigh`."""
    if form == MXFP4:
        return b.bitcast(load(b, WORDS, place), HALVES)
    if shared:
        return table_of_fp8(b, load(b, F32, place))
    return load(b, FLOATS, place), load(b, FLOATS, b.add(place, I64(LINE)))


def weigh(b: Any, form: int, shared: bool, word: Any, scale: Any) -> list[Any]:
    """The weights whose codes lie in a word of each row, lowest bits first, as vectors of pairs."""
    if form == MXFP4:
        return _weigh_mxfp4(b, word, scale)
    if shared:
        return _weigh_fp8_by_patterns(b, word, scale)
    return _weigh_by_floats(b, form, word, scale)


def _weigh_mxfp4(b: Any, word: Any, powers: Any) -> list[Any]:
    bits = [_bits_of(value) for value in VALUES]
    table = twice(b, ir.Constant(HALVES_16, [ir.Constant(I16, value) for value in bits]))
    found = []
    for first in range(0, 32, 8):  # the instruction looks at five bits of an index, of which the table ignores one
        even = b.and_(b.lshr(word, lanes(WORDS, first)), lanes(WORDS, 0xFFFF))
        above = 16 - first - 4
        odd = b.shl(word, lanes(WORDS, above)) if above >= 0 else b.lshr(word, lanes(WORDS, -above))
        value = look_up(b, table, b.bitcast(b.or_(even, b.and_(odd, lanes(WORDS, -0x10000))), HALVES))
        none = b.icmp_unsigned("==", b.and_(value, lanes(HALVES, 0x7FFF)), lanes(HALVES, 0))
        found.append(b.bitcast(b.select(none, value, b.add(value, powers)), WORDS))
    return found


def _bits_of(value: float) -> int:
    """Of a bfloat16, which this value is."""
    return int(np.float32(value).view(np.uint32)) >> 16


def _weigh_fp8_by_patterns(b: Any, word: Any, table: Any) -> list[Any]:
    kind = ir.VectorType(I8, LINE)
    codes, found = b.bitcast(word, kind), []
    for first in (0, 2):
        numbers = [n for lane in range(ROWS) for n in (4 * lane + first, LINE, 4 * lane + first + 1, LINE)]
        mask = ir.Constant(ir.VectorType(I32, LINE), [ir.Constant(I32, n) for n in numbers])
        code = b.bitcast(b.shuffle_vector(codes, lanes(kind, 0), mask), HALVES)
        found.append(b.bitcast(fp8_looked_up(b, code, table), WORDS))
    return found


def _weigh_by_floats(b: Any, form: int, word: Any, scales: tuple[Any, Any]) -> list[Any]:
    bits = CODE_BITS[form]
    shifts = ir.Constant(WORDS, [ir.Constant(I32, bits * (lane % 2)) for lane in range(ROWS)])
    halves = [b.lshr(each_twice(b, word, rows), shifts) for rows in (0, 8)]
    found = []
    for first in range(0, 32, 2 * bits):
        pair = []
        for half, scale in zip(halves, scales, strict=True):
            code = b.lshr(half, lanes(WORDS, first))
            value = int4_value(b, code, True) if form == INT4 else fp8_value(b, b.and_(code, lanes(WORDS, 255)))
            pair.append(b.fmul(value, scale))
        found.append(_round_pairs(b, *pair))
    return found


def each_twice(b: Any, vector: Any, first: int) -> Any:
    """Eight lanes of a vector, from `first`, each two times."""
    numbers = [ir.Constant(I32, first + lane // 2) for lane in range(ROWS)]
    mask = ir.Constant(ir.VectorType(I32, ROWS), numbers)
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _round_pairs(b: Any, low: Any, high: Any) -> Any:
    """VCVTNE2PS2BF16: sixteen floats, and sixteen more above them, as 32 bfloat16."""
    kind = ir.FunctionType(WORDS, [FLOATS, FLOATS])
    return b.call(ir.InlineAsm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"), [low, high])


def pairs_of(b: Any, form: int, shared: bool, words: Sequence[Any], scale: Any) -> list[Any]:
    """The sixteen vectors of a step, from the vectors of its words."""
    return [pair for word in words for pair in weigh(b, form, shared, word, scale)]
