"""A model's call on every rank: all of them are given the same, and all of them end when one does.

The ranks of a group compute one batch together. Given different tokens (sampling with different seeds) they would
add up what does not belong together, so they compare what they are given: 16 bytes a forward.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import OffloadError, RankError
from .group import Group
from .watch import FIND_S

#: Words of errors that gloo raises where a connection was closed, or nobody answered.
LOST = ("gloo", "onnection", "Timed out", "timed out", "ocket", "Application timeout")


class RankCall:
    """What `model(...)` runs on a rank: `call`, the model's own, between two looks at the other ranks."""

    def __init__(self, call: Callable[..., Any], group: Group):
        self._call, self._group = call, group
        self._failed = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._call(*args, **kwargs)
        watch = self._group.watch
        if watch is None:
            raise AssertionError("a group without a watch")
        if self._failed:
            raise RankError(
                f"an earlier call failed on this rank ({self._failed}), so the ranks are no longer in step; start all "
                "of them anew"
            )
        try:
            watch.check()
            with watch.calling():
                _compare((*args, *kwargs.values()))
                return self._call(*args, **kwargs)
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            raise self._end(error) from (error if _is_lost(error) else None)

    def _end(self, error: BaseException) -> BaseException:
        """The error to raise for `error`, once the others know: this rank takes no further part."""
        watch = self._group.watch
        found = None
        if watch is not None and _is_lost(error):
            found = watch.find_ended(FIND_S)
            if found is None:
                found_error: BaseException = RankError(
                    f"an exchange with the other ranks failed, and all of them are there ({self._failed}). Check the "
                    "network, or allow more time (rank_timeout)"
                )
            else:
                found_error = watch.error(*found)
            error = found_error
        if watch is not None:
            watch.tell_end(self._failed, because=None if found is None else found[0])
        if dist.is_initialized():  # closes the connections, for which the others wait
            dist.destroy_process_group()
        return error


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
    ends = torch.tensor([checksum, -checksum])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise RankError(
            "the ranks were given different inputs, and compute one batch together; give all the same prompts, and to "
            "sample, the same seed (transformers.set_seed(0) on each rank)"
        )
