"""A second line of work for kernels: launched beside what computes, joined before what it did is used.

    compute stream   kernel | begin ── kernel  kernel  kernel ──┐ join   kernel
    side stream             └── kernel launched within begin ───┘

A CUDA graph that is being captured takes the side stream in at `begin`, as events lead there, and cannot be ended
before it has been joined. What was begun within a capture is part of that graph, and nothing outside can wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Fork(Protocol):
    """One side stream. At most one piece of work is open: begun, and not joined yet."""

    def begin(self) -> AbstractContextManager[object]:
        """What is launched within runs after all launched so far, beside what is launched from now on."""

    def join(self) -> bool:
        """What is launched from now on runs after what was launched beside. False where it cannot: only one of the two
        is in a captured graph."""

    def capturing(self) -> bool:
        """Whether what is launched now is recorded, not run."""


class InLine:
    """No stream but one: what is launched beside is done at once."""

    def begin(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def join(self) -> bool:
        return True

    def capturing(self) -> bool:
        return False


class CudaFork:
    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None
        self._captured = False  # whether what is open is in a graph

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        begun = torch.cuda.Event()
        begun.record(torch.cuda.current_stream(self.device))
        self._stream.wait_event(begun)
        self._captured = self.capturing()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # also of a launch that failed: a capture must be joined all the same
            self._done = torch.cuda.Event()
            self._done.record(self._stream)

    def join(self) -> bool:
        done, self._done = self._done, None
        if done is None:
            return True
        if self._captured != self.capturing():
            return False
        torch.cuda.current_stream(self.device).wait_event(done)
        return True

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


#: Kind of device -> what runs kernels beside others there.
FORKS: dict[str, Callable[[torch.device], Fork]] = {"cpu": lambda device: InLine(), "cuda": CudaFork}
