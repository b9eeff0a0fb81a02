"""Recorded steps are launched by one thread of the process, whoever calls the model.

Inductor keeps its recordings by thread. A second thread (a streamer's, one per request) would record all of them anew,
in a memory pool of its own; and with torch 2.11 it fails in an assertion.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

_lock = threading.Lock()
_threads: dict[int, queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]] = {}  # by process: none survives a fork


def launch(call: Callable[[], Any], device: torch.device) -> Any:
    """The result of `call()`, run by that thread in the caller's inference mode, and on its stream of `device`.

    Ctrl-C is raised once the call is over: it may be in the middle of a recording.
    """
    inference = torch.is_inference_mode_enabled()
    stream = torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else contextlib.nullcontext()

    def launch_as_called() -> Any:
        with torch.inference_mode(inference), torch.no_grad(), stream:
            return call()

    future: Future[Any] = Future()
    _queue().put((future, launch_as_called))
    try:
        return future.result()
    except BaseException:
        future.exception()  # waits, if it was the waiting that was interrupted
        raise
    finally:
        del future  # an error in it holds this frame


def forget_recordings(device: torch.device) -> None:
    """Free all recordings and their memory pools, also one that an error has interrupted. Each is recorded anew."""
    if device.type == "cuda" and os.getpid() in _threads:
        launch(lambda: torch._inductor.cudagraph_trees.reset_cudagraph_trees(), device)


def _queue() -> queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]:
    with _lock:
        if os.getpid() not in _threads:
            _threads[os.getpid()] = queue.SimpleQueue()
            threading.Thread(
                target=_serve, args=(_threads[os.getpid()],), name="moe_offload recorded steps", daemon=True
            ).start()
        return _threads[os.getpid()]


def _serve(calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
    _keep_recordings_here()
    while True:
        future, call = calls.get()
        result = failure = None
        try:
            result = call()
        except BaseException as error:
            failure = error
        del call  # which holds a step's tensors: its caller may look at once whether anybody does (`kv_pool.py`)
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)
        del future, result, failure


def _keep_recordings_here() -> None:
    """Give this thread what Inductor keeps recordings in: torch 2.11 makes it for the thread that imports it, only."""
    from torch._inductor.cudagraph_trees import local

    if not hasattr(local, "tree_manager_containers"):
        local.tree_manager_containers = {}
        local.tree_manager_locks = defaultdict(threading.Lock)
