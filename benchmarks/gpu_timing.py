"""Times on a GPU, and host memory that a GPU reads: what `gpu_checks.py` measures with."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

REPEATS = 15
PAUSE_CYCLES = 3_000_000  # over a millisecond: time for the host to queue what is measured
MAPPED = 1 | 2  # cudaHostRegister: portable, and in the device's address space


def microseconds(f: Callable[[], Any], device: str = "cuda") -> float:
    """The device's median time for what `f` queues."""
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
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def graph(calls: Sequence[Callable[[], Any]], device: str = "cuda") -> Callable[[], Any]:
    """One CUDA graph of all calls; each has run before, so that it is compiled."""
    for call in calls:
        call()
    if device == "cpu":
        return lambda: [call() for call in calls]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured.replay


@contextlib.contextmanager
def registered(nbytes: int, device: str = "cuda") -> Iterator[tuple[Tensor, Tensor]]:
    """Host memory pinned to the byte (`pin_memory` takes the next power of two), and the device's view of it."""
    raw = torch.zeros(nbytes + 4096, dtype=torch.uint8)
    host = raw[-raw.data_ptr() % 4096 :][:nbytes]
    if device == "cpu":
        yield host, host
        return
    code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), nbytes, MAPPED))
    if code:
        raise RuntimeError(f"cudaHostRegister of {nbytes} bytes: error {code}")
    try:
        storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), torch.device("cuda", 0), nbytes)
        yield host, torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, 0, (nbytes,), (1,))
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())


def copy_rows(bank_SN: Tensor, host_EN: Tensor, count: int) -> None:
    for i in range(count):
        bank_SN[i].copy_(host_EN[i], non_blocking=True)


def copy_batch(bank_SN: Tensor, host_EN: Tensor, count: int) -> Callable[[], None]:
    from cuda.bindings import runtime

    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderAny
    side = torch.cuda.Stream()  # not allowed on the default one
    targets, sources = ([rows[i].data_ptr() for i in range(count)] for rows in (bank_SN, host_EN))
    sizes = [host_EN[0].nbytes] * count

    def copy() -> None:
        side.wait_stream(torch.cuda.current_stream())
        done = runtime.cudaMemcpyBatchAsync(targets, sources, sizes, count, [attributes], [0], 1, side.cuda_stream)
        if int(done[0]):
            raise RuntimeError(f"cudaMemcpyBatchAsync: {done[0]}")
        torch.cuda.current_stream().wait_stream(side)

    return copy


@contextlib.contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """The module's constants, otherwise for once."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)
