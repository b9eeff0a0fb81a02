"""Bounds on connections: how many there are, and how long one may be open without a request.

uvicorn waits for ever for the first line of a request, and each connection is a file descriptor of this process, which
also has to open and save files.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 512  # connections at a time; one more is closed at once
SILENT_S = 20.0  # a connection without a request for two such times is closed, if not before


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP on one connection."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST:
            transport.abort()
            return
        self._last: Any = self  # what was being answered at the last look; no answer at the first
        self._look: asyncio.TimerHandle = self.loop.call_later(SILENT_S, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "_look"):
            self._look.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and self.cycle is self._last:
            self.transport.close()
            return
        self._last = self.cycle
        self._look = self.loop.call_later(SILENT_S, self._close_if_silent)
