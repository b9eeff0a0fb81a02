"""All layers of one model: the lock that serialises its forwards, what they share, and what `close` gives back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .device_cache import Deciding
from .kernels import Kernels
from .layer_runtime import Guesses, LayerRuntime, closed
from .recorder import Recorder
from .stores import Store
from .timeline import Depth, Timeline
from .transfer import Transfer


class Runtime:
    """All layers of one model, the lock that serialises its forwards, and what `close` gives back."""

    def __init__(
        self,
        layers: Sequence[LayerRuntime],
        stores: Sequence[Store],
        transfer: Transfer,
        lock: threading.RLock | None = None,
    ):
        self.layers = list(layers)
        self.guesses = Guesses()
        for layer in self.layers:
            layer.guesses = self.guesses
        for layer, following in pairwise(self.layers):
            if layer.bank.layout.row_bytes == following.bank.layout.row_bytes:  # they share scratch rows one to one
                layer.following = following.arrivals
        self.lock = lock or threading.RLock()
        self.deciding: Deciding | None = None  # where the device decides
        self.closed = False
        self._stores, self._transfer = stores, transfer

    @property
    def slots(self) -> tuple[int, ...]:
        """Of each layer, now."""
        return tuple(layer.cache.slots for layer in self.layers)

    def check_open(self) -> None:
        if self.closed:
            raise closed("this model")

    def record(self, recorder: Recorder) -> None:
        """Write down what every layer is asked from now on."""
        self.check_open()
        with self.lock:
            for layer in self.layers:
                layer.recorder = recorder

    def decide_on_device(self, rows_LEN: Sequence[Tensor], half_life: float, kernels: Kernels) -> None:
        """Let the device decide in graphs that ask it to; `rows_LEN[l]` are all rows of layer l."""
        self.deciding = Deciding([layer.arrivals for layer in self.layers], rows_LEN, half_life, kernels)
        for layer, cache in zip(self.layers, self.deciding.caches, strict=True):
            layer.deciding, layer.device_cache = self.deciding, cache

    def check_ids(self) -> None:
        """Raise `RoutingError` if the device met an id that is no expert's."""
        if self.deciding is not None:
            self.deciding.check_ids()

    def hand_back(self) -> None:
        """Where the device decides, hear what it has decided so far. Waits for a forward in flight."""
        if self.deciding is not None:
            with self.lock:
                self.deciding.hand_back()

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

    def folders(self) -> set[Path]:
        """The folders that rows are read from. A spill file has none: its name is gone."""
        return {file.parent for store in self._stores for file in store.files if file.exists()}

    def read_stacked(self, index: int) -> dict[str, Tensor]:
        """The real stacked parameters `{field: [E, ...]}` of one layer, read anew from its store."""
        self.check_open()
        layer = self.layers[index]
        layout, num_experts = layer.bank.layout, layer.bank.num_experts
        stacked = {f.name: torch.empty((num_experts, *f.shape), dtype=f.dtype) for f in layout.fields}
        row = torch.empty(layout.row_bytes, dtype=torch.uint8)
        for e in range(num_experts):
            layer.store.read(index, e, memoryview(row.numpy()))
            for f in layout.fields:
                stacked[f.name][e] = row[f.offset : f.offset + f.nbytes].view(f.dtype).view(f.shape)
        return stacked

    def close(self) -> None:
        """Give back files, threads and memory. Idempotent; waits for a forward in flight."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            with contextlib.ExitStack() as last_first:  # each of them, whatever happens to the others
                for layer in self.layers:
                    last_first.callback(layer.release)
                for store in self._stores:
                    last_first.callback(store.close)
                last_first.callback(self._transfer.close)
                self.hand_back()
