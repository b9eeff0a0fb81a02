"""Sixteen rows of a matrix as columns: what lets one vector hold the same input of sixteen outputs.

A sum over inputs has an order, and only one vector lane per output keeps it. Rows lie in memory one after the other, so
they are turned in registers, by shuffles of 32, 64 and 128 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from ..vectors import I32, WORDS

ROWS = 16
MASK = ir.VectorType(I32, 16)


def turn_words(b: Any, rows: Sequence[Any]) -> list[Any]:
    """Sixteen vectors of sixteen words: vector j becomes word j of every row."""
    quads = [_turn_within_quads(b, rows[i : i + 4]) for i in range(0, ROWS, 4)]
    columns: list[Any] = [None] * 16
    for c in range(4):
        low, high = [quads[0][c], quads[1][c]], [quads[2][c], quads[3][c]]
        for odd in (0, 1):
            one, two = (_pick_quads(b, upper, lower, (odd, odd + 2)) for upper, lower in (low, high))
            columns[4 * odd + c] = _pick_quads(b, one, two, (0, 2))
            columns[4 * odd + 8 + c] = _pick_quads(b, one, two, (1, 3))
    return columns


def turn_quads(b: Any, rows: Sequence[Any]) -> list[Any]:
    """Sixteen vectors of four words: four vectors, of which vector j is word j of every row."""
    # Lane l of the vector i gets row 4 l + i, so that turning within lanes leaves the rows in order.
    return _turn_within_quads(b, [_join(b, rows[i::4]) for i in range(4)])


def _turn_within_quads(b: Any, rows: Sequence[Any]) -> list[Any]:
    """Four vectors, in each of whose four quads a 4 x 4 matrix of words is turned."""
    low = [_shuffle(b, rows[i], rows[i + 1], _each_quad((0, 16, 1, 17))) for i in (0, 2)]
    high = [_shuffle(b, rows[i], rows[i + 1], _each_quad((2, 18, 3, 19))) for i in (0, 2)]
    columns = []
    for one, two in (low, high):
        columns += [_shuffle(b, one, two, _each_quad(order)) for order in ((0, 1, 16, 17), (2, 3, 18, 19))]
    return columns


def _join(b: Any, quads: Sequence[Any]) -> Any:
    """Four vectors of four words as one of sixteen."""
    halves = []
    for i in (0, 2):
        mask = ir.Constant(ir.VectorType(I32, 8), [ir.Constant(I32, n) for n in range(8)])
        halves.append(b.shuffle_vector(quads[i], quads[i + 1], mask))
    return b.shuffle_vector(*halves, ir.Constant(MASK, [ir.Constant(I32, n) for n in range(16)]))


def _pick_quads(b: Any, one: Any, two: Any, which: tuple[int, int]) -> Any:
    return _shuffle(b, one, two, [side + 4 * quad + i for side in (0, 16) for quad in which for i in range(4)])


def _each_quad(order: Sequence[int]) -> list[int]:
    return [4 * quad + n for quad in range(4) for n in order]


def _shuffle(b: Any, one: Any, two: Any, mask: Sequence[int]) -> Any:
    assert one.type == WORDS
    return b.shuffle_vector(one, two, ir.Constant(MASK, [ir.Constant(I32, n) for n in mask]))
