"""What the link to a GPU gives to whoever just copies: the roof that misses from RAM are measured against.

    copy engine   cudaMemcpyAsync of one row after the other out of pinned memory
    kernel        the gather kernel: the device reads the rows by itself

Rows of the size of the model's, at places that follow one another through more memory than a cache holds.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch

from ..buffers import page_aligned
from ..kernels import KERNELS, Loads, pinned
from ..transfer_device import free_bytes as free_on

HOST_BYTES = 1 << 29
SLOTS = 8
REPEATS = 15


def free_bytes() -> int:
    return free_on("cuda:0")


def link_rates(row_bytes: int, device: str, host_bytes: int = HOST_BYTES) -> dict[str, float]:
    """Bytes/s by "copy_engine" and by "kernel", medians. Raises `RuntimeError` where the memory cannot be pinned."""
    kind = torch.device(device).type
    experts = max(2 * SLOTS, host_bytes // row_bytes)
    host_EB = page_aligned(experts * row_bytes).view(experts, row_bytes)
    host_EB.zero_()  # pages that are there
    with contextlib.ExitStack() as undo:
        rows_EB = host_EB
        if kind == "cuda":
            undo.callback(pinned.unpin, host_EB)
            if error := pinned.pin(host_EB):
                raise RuntimeError(f"{host_EB.nbytes} bytes of host memory cannot be pinned: {error}")
            rows_EB = pinned.device_view(host_EB, "cuda:0")
            undo.callback(torch.cuda.synchronize)
        bank_SB = torch.empty((SLOTS, row_bytes), dtype=torch.uint8, device=device)
        loads = Loads.empty(SLOTS, device)
        loads.slot_P.copy_(torch.arange(SLOTS))
        loads.count_1.fill_(SLOTS)
        gather = KERNELS[kind]().gather

        def copied(first: int) -> None:
            for slot in range(SLOTS):
                bank_SB[slot].copy_(host_EB[first + slot], non_blocking=True)

        def gathered(first: int) -> None:
            gather(rows_EB, bank_SB, loads)

        def choose(first: int) -> None:
            loads.expert_P.copy_(torch.arange(first, first + SLOTS))

        firsts = [i * SLOTS % (experts - SLOTS + 1) for i in range(REPEATS)]
        moved = SLOTS * row_bytes
        return {
            "copy_engine": moved / statistics.median(_seconds(copied, first, kind) for first in firsts),
            "kernel": moved / statistics.median(_seconds(gathered, first, kind, choose) for first in firsts),
        }


def _seconds(
    work: Callable[[int], None], first: int, kind: str, prepare: Callable[[int], None] = lambda first: None
) -> float:
    """How long the device is busy with `work`: from when all before it is done until it is."""
    prepare(first)
    if kind == "cpu":
        begun = time.perf_counter()
        work(first)
        return time.perf_counter() - begun
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work(first)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def fastest(rates: dict[str, float]) -> float:
    """The bandwidth that no way of copying beats: bytes/s."""
    return max(rates["copy_engine"], rates["kernel"])
