"""Recorded steps: all threads launch the same ones, one thread at a time.

Inductor keeps its recordings by thread. A second thread (a streamer's, one per request) would record all of them anew,
in a memory pool of its own; and with torch 2.11 it fails in an assertion. So while a step of ours is launched its
thread has, in their place, those that we keep for the process; what a user records elsewhere is apart from them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: What Inductor keeps by thread, as it names it: its recordings by device, and a lock for each.
_OURS: dict[str, Any] = {"tree_manager_containers": {}, "tree_manager_locks": defaultdict(threading.Lock)}
_one_at_a_time = threading.RLock()


def launch(call: Callable[[], Any], device: torch.device) -> Any:
    """The result of `call()`. If it fails, or is interrupted in the middle of a recording, all are recorded anew."""
    with _one_at_a_time, _ours():
        try:
            return call()
        except BaseException:
            _forget(device)
            raise


def forget_recordings(device: torch.device) -> None:
    """Free all recordings and their memory pools, also one that an error has interrupted. Each is recorded anew."""
    with _one_at_a_time, _ours():
        _forget(device)


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch._inductor.cudagraph_trees.reset_cudagraph_trees()


@contextmanager
def _ours() -> Iterator[None]:
    """While it is entered, this thread has our recordings in place of its own."""
    from torch._inductor.cudagraph_trees import local

    before = dict(vars(local))
    vars(local).update(_OURS)
    try:
        yield
    finally:
        vars(local).clear()
        vars(local).update(before)
