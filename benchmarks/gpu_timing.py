"""What `gpu_checks.py` measures with, beside `bench`'s own link: graphs, and copies in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


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
