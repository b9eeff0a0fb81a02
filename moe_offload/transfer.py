"""Move a row from a store into device memory: start, then wait.

`start` may do anything from all of the work to none of it; after `wait` returns, the row's bytes are where the next
kernel will read them. Adding a device is one class and one line in `TRANSFERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .stores import Store


@dataclass
class Ticket:
    """A transfer under way, or done."""

    nbytes: int


class Transfer(Protocol):
    def start(self, store: Store, layer: int, expert: int, row: memoryview) -> Ticket:
        """Begin to fill `row` (writable bytes of one slot) with that expert. Errors of the store may surface here."""

    def wait(self, ticket: Ticket) -> int:
        """Return the bytes moved, once the row is complete. Errors of the store may surface here too."""

    def close(self) -> None: ...


class SyncTransfer:
    """Reads straight into the slot, in the calling thread: the reference every other transfer must equal."""

    def start(self, store: Store, layer: int, expert: int, row: memoryview) -> Ticket:
        return Ticket(store.read(layer, expert, row))

    def wait(self, ticket: Ticket) -> int:
        return ticket.nbytes

    def close(self) -> None:
        pass


TRANSFERS: dict[str, Callable[[], Transfer]] = {"cpu": SyncTransfer}
