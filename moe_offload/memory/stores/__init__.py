"""Stores: where experts' rows rest while they are not in a slot.

Adding one is one class with `files`, `how`, `begin`, `read` and `close`, and one line in `STORES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from .disk import DiskStore
from .host import HostStore
from .row_read import RowRead

STORES: dict[str, Any] = {
    "disk": DiskStore,
    "host": HostStore,
}


class Store(Protocol):
    """One medium that holds the rows of some layers. Safe to call from several threads."""

    @property
    def files(self) -> list[Path]:
        """The files that rows are read from, by the names they were opened under; none for a medium without files."""

    @property
    def how(self) -> set[str]:
        """How those files are read: past the page cache or through it (`files/system.py`)."""

    def begin(self, layer: int, expert: int, row: memoryview) -> RowRead:
        """The work of filling `row` as `read` does, in parts that several threads may do; nothing is read yet."""

    def read(self, layer: int, expert: int, row: memoryview) -> int:
        """Fill `row` with that expert's fields at their layout's offsets; return the bytes read from the medium.

        `row` is exactly the layer's `row_bytes`, writable, of format 'B'; bytes between fields may keep any value. May
        block. After an error, what `row` holds is undefined. Raises `ExpertReadError`, `CheckpointChangedError`,
        `ClosedError` after `close`, `IndexError` for a layer or expert the store does not hold, `ValueError` for a row
        of the wrong size.
        """

    def close(self) -> None:
        """Give back descriptors and memory, once reads under way are done. May be called again."""
