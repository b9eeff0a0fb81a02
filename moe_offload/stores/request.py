"""What every store checks before it serves a request: a negative index would otherwise count from the end."""

from __future__ import annotations


def check_request(layer: int, expert: int, counts: list[int], row: memoryview, row_bytes: list[int]) -> None:
    """`counts[layer]` experts of `row_bytes[layer]` bytes each are held. Raises `IndexError` or `ValueError`."""
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
