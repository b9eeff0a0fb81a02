"""Ctrl-C and SIGTERM of a command that serves until it is told to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """What Ctrl-C and SIGTERM mean: while the model loads an interrupt; while it serves a wish, which a second Ctrl-C
    makes an interrupt."""

    def __init__(self) -> None:
        self.serving, self.asked, self.asked_s = False, threading.Event(), 0.0

    def __call__(self, number: int, _: object) -> None:
        if not self.serving or (self.asked.is_set() and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.asked_s = time.monotonic()
        self.asked.set()


@contextmanager
def on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` is called on Ctrl-C and SIGTERM, in the main thread."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
