"""`RowRead`, which every store answers a request with, and the check of the request before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowRead:
    """One row on its way: `parts` may run in any order and in any thread, `finish` after the last of them.

    Neither starts a thread. `finish` returns the bytes read from the medium. Both raise what `Store.read`
    raises.
    """

    parts: Sequence[Callable[[], None]]
    finish: Callable[[], int]

    def run(self) -> int:
        """All of it, in the calling thread."""
        for part in self.parts:
            part()
        return self.finish()


def check_request(layer: int, expert: int, counts: list[int], row: memoryview, row_bytes: list[int]) -> None:
    """`counts[layer]` experts of `row_bytes[layer]` bytes each are held. Raises `IndexError` or `ValueError`.

    A negative index would otherwise count from the end.
    """
    if not (0 <= layer < len(counts) and 0 <= expert < counts[layer]):
        held = counts[layer] if 0 <= layer < len(counts) else 0
        raise IndexError(
            f"layer {layer}, expert {expert}: this store has {len(counts)} layers, {held} experts of that one"
        )
    if row.readonly or row.format != "B" or row.nbytes != row_bytes[layer] or not row.c_contiguous:
        raise ValueError(
            f"layer {layer}: a row is {row_bytes[layer]} contiguous writable bytes of format 'B', got {row.nbytes} of "
            f"format {row.format!r}{', read-only' if row.readonly else ''}"
        )
