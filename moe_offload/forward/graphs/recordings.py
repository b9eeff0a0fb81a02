"""Recorded steps: all threads launch the same ones, one thread at a time.

Inductor keeps its recordings by thread. A second thread (a streamer's, one per request) would record all of them anew,
in a memory pool of its own; and with torch 2.11 it fails in an assertion. So while a step of ours is launched its
thread has, in their place, those that we keep for the process; what a user records elsewhere is apart from them.

What Inductor has compiled holds the recordings that it has made, and fails once they were freed. So it is handed
functions that record anew then.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ...memory.transfer.turns import Turns

#: What Inductor keeps by thread, as it names it: its recordings by device, and a lock for each.
_OURS: dict[str, Any] = {"tree_manager_containers": {}, "tree_manager_locks": defaultdict(threading.Lock)}
_one_at_a_time = threading.RLock()
_turns: dict[torch.device, Turns] = {}  # on streams of their own callers would still share the recordings' memory
_freed = 0  # how often all recordings were


def launch(call: Callable[[], Any], device: torch.device) -> Any:
    """The result of `call()`. If it fails, or is interrupted in the middle of a recording, all are recorded anew."""
    with _one_at_a_time, _ours(), _in_turn(device):
        try:
            return call()
        except BaseException:
            _free()
            raise


def forget_recordings() -> None:
    """Free all recordings and their memory pools, also one that an error has interrupted. Each is recorded anew."""
    with _one_at_a_time, _ours():
        _free()


def _free() -> None:
    global _freed
    _freed += 1
    containers = _OURS["tree_manager_containers"]
    for container in containers.values():
        if container.tree_manager is not None:
            container.tree_manager.shutdown()
    containers.clear()


def _in_turn(device: torch.device) -> AbstractContextManager[object]:
    return _turns.setdefault(device, Turns(device)).taken() if device.type == "cuda" else nullcontext()


@contextmanager
def _ours() -> Iterator[None]:
    """While it is entered, this thread has our recordings in place of its own."""
    from torch._inductor import cudagraph_trees as trees

    before, record = dict(vars(trees.local)), trees.cudagraphify
    vars(trees.local).update(_OURS)
    trees.cudagraphify = _recording(record)
    try:
        yield
    finally:
        trees.cudagraphify = record
        vars(trees.local).clear()
        vars(trees.local).update(before)


def _recording(record: Callable[..., Any]) -> Callable[..., Any]:
    """In place of what Inductor records a step with. `record` returns a function that replays, and its first result."""

    def record_again(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], Any]:
        replay, output = record(model, inputs, *args, **kwargs)
        made = _freed

        def run(inputs: Any) -> Any:
            nonlocal replay, made
            if made == _freed:
                return replay(inputs)
            replay, output = record(model, inputs, *args, **kwargs)
            made = _freed
            return output

        return run, output

    return record_again
