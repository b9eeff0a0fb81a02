"""All layers of one model: the lock that serialises its forwards, what they share, and what `close` gives back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..memory.buffers import page_aligned
from ..memory.stores import Store
from ..memory.transfer import Transfer
from ..observe.timeline import Depth, Timeline
from ..observe.trace.recorder import TraceRecorder
from ..packed.workspace import free_workspace
from .ahead.guesses import Guesses
from .ahead.on_device import DeviceGuesses
from .device_cache import DeviceCaches
from .in_flight import Arrivals
from .kernels import Kernels
from .layer import LayerRuntime
from .lock import ModelLock, closed_error


class Runtime:
    """All layers of one model, the lock that serialises its forwards, and what `close` gives back."""

    def __init__(
        self,
        layers: Sequence[LayerRuntime],
        stores: Sequence[Store],
        transfer: Transfer,
        lock: ModelLock | None = None,
    ):
        self.layers = list(layers)
        self.guesses = Guesses()
        for layer in self.layers:
            layer.guesses = self.guesses
        for layer, following in pairwise(self.layers):
            if layer.moe.layout.row_bytes == following.moe.layout.row_bytes:  # they share scratch rows one to one
                layer.following = following.arrivals
        self._calls = [layer.calls for layer in self.layers if layer.calls is not None]
        for calls in self._calls:
            calls.end_events = self.end_events
        self._lock = lock or ModelLock()
        self.device_caches: DeviceCaches | None = None  # where the device decides
        self.device_layers: frozenset[int] = frozenset()  # the layers it decides for
        self.recorder: TraceRecorder | None = None  # while a trace is recorded
        self.closed = False
        self._busy = False
        self._waiting: list[Callable[[], None]] = []  # for whoever has the lock to be done
        self._stores, self._transfer = stores, transfer

    @property
    def slots(self) -> tuple[int, ...]:
        """The number of slots of each layer, now."""
        return tuple(layer.cache.slots for layer in self.layers)

    @property
    def lock(self) -> threading.RLock:
        """What serialises the forwards. Raises `ClosedError` in a process forked from the model's."""
        return self._lock.here()

    def alone(self) -> AbstractContextManager[object]:
        """While it is entered, no forward runs. In a process forked from this one none does, and the lock is not to be
        taken: a thread that is not there may have held it."""
        return self.lock if self._lock.is_here else contextlib.nullcontext()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While it is entered, by whoever has the lock, what is given to `when_idle` waits."""
        before = self._busy
        try:
            self._busy = True
            yield
        finally:
            self._busy = before
            while self._waiting and not before:
                self._waiting.pop(0)()

    def when_idle(self, action: Callable[[], None]) -> None:
        """Run `action` while nothing runs; where this thread itself is in the middle of it, at its end.

        A hook may close the model, and wherever Python collects garbage a model may be found that nobody holds, while
        one of its parts still runs: the lock, which this thread has, keeps neither out.
        """
        with self.alone():
            if self._busy and self._lock.is_here:
                self._waiting.append(action)
            else:
                action()

    def end_events(self) -> None:
        """Whatever experts have been asked for one by one, that was all of it."""
        for calls in self._calls:
            calls.end_event()

    def give_up_calls(self) -> None:
        """A forward has failed: no expert is in use any more."""
        for calls in self._calls:
            calls.give_up()

    def check_open(self) -> None:
        """Raise `ClosedError` after `close`, and in a forked process: there torch's own threads, with which rows are
        unpacked and copied, are waited for in vain."""
        self._lock.here()
        if self.closed:
            raise closed_error("this model")

    def record_trace(self, recorder: TraceRecorder) -> None:
        """Write down what every layer is asked from now on."""
        self.check_open()
        with self.lock:
            self.recorder = recorder
            for layer in self.layers:
                layer.recorder = recorder
            for calls in self._calls:
                calls.recorder = recorder

    def decide_on_device(
        self,
        rows_EN: Mapping[int, Tensor | None],
        half_life: float,
        kernels: Kernels,
        guess: Callable[[Sequence[Arrivals]], DeviceGuesses] | None = None,
    ) -> None:
        """Let the device decide for the layers that are keys of `rows_EN`, in graphs that ask it to.

        `rows_EN[l]` are all rows of layer l, None where it cannot read them and each has a slot of its own. `guess`
        makes what reads ahead for these layers, where the device is to do that.
        """
        self.device_layers, decided = frozenset(rows_EN), [self.layers[i] for i in rows_EN]
        arrivals = [layer.arrivals for layer in decided]
        guesses = None if guess is None else guess(arrivals)
        self.device_caches = DeviceCaches(arrivals, list(rows_EN.values()), half_life, kernels, guesses)
        for layer in self.layers:
            layer.device_caches = self.device_caches
        for layer, cache in zip(decided, self.device_caches.caches, strict=True):
            layer.device_cache = cache

    def leave_to_host(self) -> None:
        """After slots have become fewer: layers whose non-resident rows the device cannot read go back to the host."""
        if self.device_caches is None:
            return
        kept = [cache for cache in self.device_caches.caches if cache.readable]
        self.device_layers = frozenset(
            i for i in self.device_layers if self.layers[i].arrivals in [one.arrivals for one in kept]
        )
        self.device_caches.caches = kept
        if not kept:
            self.device_caches = None
        for layer in self.layers:
            layer.device_caches = self.device_caches
            if layer.moe.index not in self.device_layers:
                layer.device_cache = None

    def current(self) -> AbstractContextManager[object]:
        """While it is entered, this thread launches on the device that the model computes on."""
        return self._transfer.current()

    def end_step(self) -> None:
        """A forward has been launched. Raises `RoutingError` if the device met an id that is no expert's."""
        if self.device_caches is not None:
            self.device_caches.end_step()

    def hand_back(self) -> None:
        """Copy the device's slot tables and counters to the host's caches. Waits for a forward in flight."""
        if self.device_caches is not None:
            with self.lock, self.current():
                self.device_caches.hand_back()

    def depth(self) -> Depth:
        """What is queued and being read now."""
        return self._transfer.depth()

    @property
    def timeline(self) -> Timeline | None:
        return self._transfer.timeline

    def record_timeline(self, timeline: Timeline) -> None:
        """Write down what happens when, from now on."""
        self.check_open()
        with self.lock:
            self._transfer.timeline = timeline

    def how_read(self) -> list[str]:
        """In which ways rows are read from files: past the page cache, or through it."""
        return sorted({how for store in self._stores for how in store.how})

    def folders(self) -> set[Path]:
        """The folders that rows are read from. A spill file has none: its name is gone."""
        return {file.parent for store in self._stores for file in store.files if file.exists()}

    def read_stacked(self, index: int) -> dict[str, Tensor]:
        """The real stacked parameters `{field: [E, ...]}` of one layer, read anew from its store."""
        self.check_open()
        layer = self.layers[index]
        fields, num_experts = layer.moe.unpacked.fields, layer.moe.num_experts
        stacked = {f.name: torch.empty((num_experts, *f.shape), dtype=f.dtype, device="cpu") for f in fields}
        for e in range(num_experts):
            row = self.read_unpacked(index, e)
            for f in fields:
                stacked[f.name][e] = f.view_in(row)
        return stacked

    def read_unpacked(self, index: int, expert: int) -> Tensor:
        """One expert's row, read anew from its store, with the parameters themselves (`unpacked` lays them out)."""
        layer = self.layers[index]
        row = page_aligned(layer.moe.layout.row_bytes)
        layer.store.read(index, expert, row.numpy().data)
        if not layer.moe.packed:
            return row
        return layer.moe.unpack_row(row, page_aligned(layer.moe.unpacked.row_bytes))

    def close(self) -> None:
        """Give back files, threads and memory. Idempotent; waits for a forward in flight."""
        with self.alone(), self.current():
            if self.closed:
                return
            self.closed = True
            with contextlib.ExitStack() as last_first:  # each of them, whatever happens to the others
                for layer in self.layers:
                    last_first.callback(layer.release)
                for store in self._stores:
                    last_first.callback(store.close)
                last_first.callback(self._transfer.close)
                last_first.callback(setattr, self, "device_caches", None)
                last_first.callback(free_workspace)
                if self._lock.is_here:
                    with _disable_current_modes():  # garbage is collected while Dynamo traces, too
                        self.hand_back()
