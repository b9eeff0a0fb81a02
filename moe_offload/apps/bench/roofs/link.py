"""What the link between host and device gives to whoever just copies: the roof that missing rows are measured against.

Shapes: E rows of N elements in pinned host memory, S slots on the device.

Whole rows, scattered, from pinned memory into slots: by the copy engine, row by row, as prompts are served; and by our
gather kernel, as decode steps are. The better of the two is the roof.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....errors import OffloadError
from ....memory.buffers import page_aligned
from ....memory.transfer import pinned
from ....runtime.kernels import KERNELS, Loads

REPEATS = 15
PAUSE_CYCLES = 3_000_000  # over a millisecond: time for the host to queue what is measured
ROWS, COPIED = 32, 8  # rows in host memory, and how many of them are copied at a time


class LinkRoof:
    """`measure` takes some tens of milliseconds; what it found by which way, `details` says."""

    def __init__(self, rows_EN: Tensor, view_EN: Tensor, device: str):
        self.rows_EN, self.view_EN, self.device = rows_EN, view_EN, device
        self.bank_SN = torch.empty((COPIED, rows_EN.shape[1]), dtype=rows_EN.dtype, device=device)
        self.gather = KERNELS[device.partition(":")[0]]().gather
        self.found: dict[str, list[float]] = {"copy_engine_bytes_per_s": [], "kernel_bytes_per_s": []}

    def measure(self, seed: int) -> float:
        """Bytes per second of the faster way."""
        experts = random.Random(seed).sample(range(ROWS), COPIED)
        loads = Loads.empty(COPIED, self.device)
        loads.slot_P.copy_(torch.arange(COPIED))
        loads.expert_P.copy_(torch.tensor(experts))
        loads.count_1.fill_(COPIED)
        ways = (
            partial(copy_rows, self.bank_SN, self.rows_EN, experts),
            partial(self.gather, self.view_EN, self.bank_SN, loads),
        )
        rates = [self.bank_SN.nbytes / measure_us(way, self.device) * 1e6 for way in ways]
        for found, rate in zip(self.found.values(), rates, strict=True):
            found.append(rate)
        return max(rates)

    def details(self) -> dict[str, float]:
        return {way: statistics.median(rates or [0.0]) for way, rates in self.found.items()}


@contextlib.contextmanager
def link_roof(row_bytes: int, device: str) -> Iterator[LinkRoof]:
    """The roof for rows of so many bytes (a multiple of 16)."""
    with registered_memory(ROWS * row_bytes, device) as (host, view):
        yield LinkRoof(host.view(ROWS, row_bytes), view.view(ROWS, row_bytes), device)


@contextlib.contextmanager
def registered_memory(nbytes: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Host memory pinned to the byte (`pin_memory` takes the next power of two), and the device's view of it.

    Raises `OffloadError` where it cannot be pinned.
    """
    host = page_aligned(nbytes).zero_()
    if device == "cpu":
        yield host, host
        return
    rows = host.view(1, nbytes)
    error = pinned.pin_rows(rows)
    if error:
        raise OffloadError(f"{nbytes} bytes of host memory cannot be pinned ({error}); raise the memlock limit")
    try:
        yield host, pinned.device_view(host, device)
    finally:
        torch.cuda.synchronize()
        pinned.unpin_rows(rows)


def copy_rows(bank_SN: Tensor, host_EN: Tensor, experts: list[int]) -> None:
    for slot, e in enumerate(experts):
        bank_SN[slot].copy_(host_EN[e], non_blocking=True)


def measure_us(f: Callable[[], Any], device: str) -> float:
    """The device's median time for what `f` queues; on a CPU, the time of one call."""
    f()
    if device == "cpu":
        begun = time.perf_counter()
        f()
        return (time.perf_counter() - begun) * 1e6
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3)
    return statistics.median(times)
