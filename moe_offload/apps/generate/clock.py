"""A clock that stops while a graph is compiled, so that this cost, which is paid once, is reported apart."""

from __future__ import annotations

import time
from typing import Any


class Clock:
    """Seconds since it was made, in `__call__`; `compiling_s` are those it has left out. Close it after use."""

    def __init__(self) -> None:
        from torch._dynamo.callback import callback_handler

        self.compiling_s = 0.0
        self._made, self._since = time.perf_counter(), 0.0
        self._callbacks = callback_handler
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)

    def __call__(self) -> float:
        return time.perf_counter() - self._made - self.compiling_s

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self._callbacks.remove_start_callback(self._begin)
        self._callbacks.remove_end_callback(self._end)

    def _begin(self, _: Any) -> None:
        """Dynamo calls this and `_end` for the outermost compilation only."""
        self._since = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.compiling_s += time.perf_counter() - self._since
