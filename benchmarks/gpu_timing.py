"""What `gpu_checks.py` measures with, beside `bench`'s own link: graphs, and copies in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_offload.memory.transfer.batch import find_batch_copy


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
    """As a prompt copies the rows of a group. Raises `LookupError` where the runtime has no such call."""
    batch, side = find_batch_copy(), torch.cuda.Stream()  # it is not allowed on the default one
    refused = "this CUDA runtime has none" if batch is None else batch.try_out(bank_SN.device, side)
    if batch is None or refused:
        raise LookupError(refused)
    copies = [(bank_SN[i].data_ptr(), host_EN[i].data_ptr(), host_EN[i].nbytes) for i in range(count)]

    def copy() -> None:
        side.wait_stream(torch.cuda.current_stream())
        batch.copy(copies, side.cuda_stream)
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
