"""A model's call on every rank: all of them are given the same, and all of them end when one does.

The ranks of a group compute one batch together. Given different tokens (sampling with different seeds) they would
add up what does not belong together, so they compare what they are given: 16 bytes a forward.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import OffloadError, RankError
from .group import Group
from .names import in_a_line
from .watch import FIND_S

#: Words of errors that gloo raises where a connection was closed, or nobody answered.
LOST = ("gloo", "onnection", "Timed out", "timed out", "ocket", "Application timeout")


class RankCall:
    """What `model(...)` runs on a rank: `call`, the model's own, once all ranks are known to be given the same."""

    def __init__(self, call: Callable[..., Any], group: Group):
        self._call, self._group = call, group

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._call(*args, **kwargs)
        with exchanging(self._group):
            _compare((*args, *kwargs.values()))
            return self._call(*args, **kwargs)


@contextlib.contextmanager
def exchanging(group: Group | None) -> Iterator[None]:
    """Ranks exchange tensors inside. One that fails there takes no further part, and an exchange that was lost is a
    `RankError` which names the rank that has ended."""
    watch = None if group is None else group.watch
    if group is None or watch is None:
        yield
        return
    if group.failed:
        group.check()
    try:
        watch.check()
        with watch.calling():
            yield
    except BaseException as error:
        group.failed = in_a_line(error)
        if not _is_lost(error):
            leave(group)
            raise
        found = watch.find_ended(FIND_S)
        leave(group, None if found is None else found[0])
        if found is not None:
            raise watch.error(*found) from error
        raise RankError(
            f"an exchange with the other ranks failed, and all of them are there ({group.failed}). Check the network, "
            "or allow more time (rank_timeout)"
        ) from error


def leave(group: Group, because: int | None = None) -> None:
    """Take no further part, and let the others know: `group.failed`, and because of which rank."""
    if group.watch is not None:
        group.watch.tell_end(group.failed, because=because)
    if dist.is_initialized():  # closes the connections, for which the others wait
        dist.destroy_process_group()


def _is_lost(error: BaseException) -> bool:
    """Whether an exchange failed. Errors of ours, and of the model, have their own words."""
    if not isinstance(error, RuntimeError) or isinstance(error, OffloadError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)


def _compare(given: Iterable[Any]) -> None:
    """Raise `RankError` unless all ranks were given the same tensors."""
    checksum = 0
    for tensor in given:
        if type(tensor) is Tensor and tensor.device.type == "cpu":
            flat = tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().view(1)
            checksum = zlib.crc32(flat.numpy().tobytes(), checksum)
    ends = torch.tensor([checksum, -checksum], device="cpu")
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise RankError(
            "the ranks were given different inputs, and compute one batch together; give all the same prompts, and to "
            "sample, the same seed (transformers.set_seed(0) on each rank)"
        )
