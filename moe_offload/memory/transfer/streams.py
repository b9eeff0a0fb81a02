"""The streams of one device: in what order kernels and copies run there, and where the host waits.

    compute stream   kernel  kernel | mark ──────────────┐          order(event): what follows begins after it
    copy stream                     copy(after=mark) ────┴─ event
    background        copy, copy ...                                what nobody has asked for yet

`CudaStreams` is the only class of transfers that knows CUDA; tests put a slow one, or one on a CPU, in its place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from . import pinned
from .batch import BatchCopy, find_batch_copy
from .turns import Turns

logger = logging.getLogger("moe_offload")


class Streams(Protocol):
    """The streams of one device. An event is whatever `mark` and `copy` return."""

    def pin(self, buffer: Tensor) -> None:
        """Let the device read this page-aligned host memory by itself, if that is possible."""

    def unpin(self, buffer: Tensor) -> None:
        """Undo `pin`, before the memory is given back."""

    def mark(self) -> Any:
        """The moment when all that has been launched on the compute stream so far is done."""

    def copy(self, target: Tensor, source: Tensor, after: Any, background: bool = False) -> Any:
        """Copy on the stream beside, or on that for the background, not before `after`; the event is its end. May be
        called by any thread."""

    def copy_all(self, targets: Sequence[Tensor], sources: Sequence[Tensor], after: Any) -> Any:
        """`copy` of each, none of which overlap; the event is the end of all. The sources are pinned."""

    def send(self, values: Tensor) -> Tensor:
        """`values`, of the host, on the device, for what is launched from now on. The host does not wait."""

    def order(self, event: Any) -> None:
        """What is launched on the compute stream from now on begins after `event`. The host does not wait."""

    def finish(self, event: Any) -> None:
        """The host waits for `event`."""

    def ended(self, event: Any) -> bool:
        """Whether `event` is over. The host does not wait."""

    def moment(self) -> Any:
        """When the compute stream gets here: see `seconds`."""

    def seconds(self, begin: Any, end: Any) -> float | None:
        """The time between two moments; None as long as the second has not come."""

    def drain(self) -> None:
        """The host waits for all copies."""

    def current(self) -> AbstractContextManager[object]:
        """While it is entered, this thread launches on this device."""

    def in_turn(self) -> AbstractContextManager[object]:
        """As `current`; and what is launched within comes after what callers on other streams have launched in it."""

    def capturing(self) -> bool:
        """Whether what is launched on the compute stream is recorded into a graph instead of run."""


class CudaStreams:
    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.background = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
        self._warned = False
        self._turns = Turns(device)
        self._batch: BatchCopy | None = None  # once `_find_batch` has found one
        self._sought = False

    def pin(self, buffer: Tensor) -> None:
        with self.current():  # to register memory is to start CUDA on the current device
            error = pinned.pin_rows(buffer.view(1, -1))
        if error and not self._warned:
            self._warned = True
            logger.warning("CUDA could not pin the memory that rows are staged in (%s): they are copied slowly", error)

    def unpin(self, buffer: Tensor) -> None:
        with self.current():
            pinned.unpin_rows(buffer.view(1, -1))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(
        self, target: Tensor, source: Tensor, after: torch.cuda.Event, background: bool = False
    ) -> torch.cuda.Event:
        stream = self.background if background else self.stream
        with self.current(), torch.cuda.stream(stream):
            stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def copy_all(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], after: torch.cuda.Event
    ) -> torch.cuda.Event:
        with self.current(), torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            batch = self._find_batch()
            pairs = list(zip(targets, sources, strict=True))
            if batch is None:
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
            else:
                if any(not target.is_contiguous() or target.nbytes != source.nbytes for target, source in pairs):
                    raise AssertionError("rows are copied whole, each to one of its size")
                batch.copy([(t.data_ptr(), s.data_ptr(), s.nbytes) for t, s in pairs], self.stream.cuda_stream)
            done = torch.cuda.Event()
            done.record(self.stream)
        return done

    def _find_batch(self) -> BatchCopy | None:
        """What copies many rows in one call, once it has been tried out; None where there is none."""
        if not self._sought:
            batch = find_batch_copy()
            refused = "" if batch is None else batch.try_out(self.device, self.stream)
            if refused:
                logger.info("rows are copied one by one: the driver has no batched copies (%s)", refused)
            self._batch, self._sought = (None if refused else batch), True
        return self._batch

    def send(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.device, non_blocking=True)

    def order(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def ended(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def moment(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1e3 if end.query() else None

    def drain(self) -> None:
        self.stream.synchronize()
        self.background.synchronize()

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        with self.current(), self._turns.taken():
            yield

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()
