"""Callers that launch on streams of their own, one after the other: a lock makes them take turns on the host, and not
on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Turns:
    """Of what only one caller may use at a time: slots, their tables, the memory of recorded steps. Enter it under a
    lock that all callers take.

    Within a capture nothing is ordered: it has its stream to itself, and whoever replays it chooses where.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """What is launched within begins after what was launched in the turn before."""
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
        try:
            yield
        finally:
            event = torch.cuda.Event()
            event.record(stream)
            self._last = stream, event
