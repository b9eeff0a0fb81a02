"""A row on its way to a device, and rows that wait to be copied there by one call.

    with together:   start a, start b, start c      noted
    at its end       copy_all(a, b)  copy_all(c)    one event for all of a call: its end is that of each of its rows

What is not launched, because anything has failed, is over with that error: nobody can wait for it in vain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..stores.row_read import RowRead
from .streams import Streams
from .ticket import Ticket


class DeviceTicket(Ticket):
    """`copies` are the ends of the copies into the slot, as far as they have been launched and nobody waited for
    them."""

    staging: Any = None  # the buffer that it is read into, until it has been copied out of there

    def __init__(self, layer: int, expert: int, read: RowRead, row_bytes: int, demanded: bool):
        super().__init__(layer, expert, read, row_bytes, demanded)
        self.copies: list[Any] = []


@contextlib.contextmanager
def all_known(streams: Streams) -> Iterator[None]:
    """Around launching copies, until their tickets have their ends. Where that fails or is interrupted, copies may be
    under way that no ticket knows of, into slots that are about to be given back: the host waits for them."""
    try:
        yield
    except BaseException:
        streams.drain()
        raise


@dataclass
class Waiting:
    """Rows of the host's pinned memory that are to be copied: `(ticket, target, source)` each."""

    rows: list[tuple[DeviceTicket, Any, Tensor]] = field(default_factory=list)

    def add(self, ticket: DeviceTicket, target: Any, source: Tensor) -> None:
        self.rows.append((ticket, target, source))

    def parts(self, most: int) -> Iterator[Waiting]:
        """The same, up to `most` at a time."""
        return (Waiting(self.rows[i : i + most]) for i in range(0, len(self.rows), most))

    def launch(self, streams: Streams) -> Any:
        """Copy all of them; returns the event of their end. The slots' last readers have been launched by now."""
        tickets, targets, sources = zip(*self.rows, strict=True)
        with all_known(streams):
            copied = streams.copy_all(targets, sources, streams.mark())
            for ticket in tickets:
                ticket.copies.append(copied)
        for ticket in tickets:
            ticket.nbytes = ticket.row_bytes
            ticket.done.set()
        return copied

    @contextlib.contextmanager
    def launched_or_failed(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            for ticket in (one for one, _, _ in self.rows if not one.done.is_set()):
                ticket.error = error
                ticket.done.set()
            raise
