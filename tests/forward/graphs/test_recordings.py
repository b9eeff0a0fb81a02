"""Recorded steps: every thread launches the same ones, one at a time, and has its own again afterwards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._inductor import cudagraph_trees

from moe_offload.forward.graphs.recordings import forget_recordings, launch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def kept_by_this_thread():
    """What Inductor finds its recordings in."""
    return tuple(
        cudagraph_trees.get_obj(cudagraph_trees.local, f"tree_manager_{name}") for name in ("containers", "locks")
    )


def test_all_threads_launch_the_same_recordings_and_keep_their_own():
    def look():
        own = kept_by_this_thread()
        ours = launch(kept_by_this_thread, CPU)
        assert kept_by_this_thread() == own and all(x is not y for x, y in zip(own, ours, strict=True))
        return threading.get_ident(), tuple(map(id, ours))

    with ThreadPoolExecutor(2) as threads:
        found = [look(), *threads.map(lambda _: look(), range(4))]
    threads_seen, ours_seen = map(set, zip(*found, strict=True))
    assert len(threads_seen) > 1 and len(ours_seen) == 1


def test_a_thread_that_torch_has_given_nothing_to_can_launch():
    """torch 2.11 makes what it keeps for the thread that imports it, and fails in an assertion in all others."""

    def look():
        assert not vars(cudagraph_trees.local)
        found = launch(kept_by_this_thread, CPU)
        assert not vars(cudagraph_trees.local)
        return found

    with ThreadPoolExecutor(1) as thread:
        assert all(x is y for x, y in zip(thread.submit(look).result(), launch(kept_by_this_thread, CPU), strict=True))


def test_one_thread_at_a_time():
    inside, most = [], []

    def step():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: launch(step, CPU), range(8)))
    assert most == [1] * 8


@pytest.mark.parametrize("inference", [False, True])
def test_the_modes_are_the_callers(inference):
    with torch.inference_mode(inference), torch.no_grad():
        made = launch(lambda: torch.ones(1), CPU)
        assert made.is_inference() == inference
        assert not launch(torch.is_grad_enabled, CPU)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()])
def test_after_an_error_or_ctrl_c_all_is_recorded_anew(monkeypatch, error):
    """It may have come in the middle of a recording, or of what is written down about one."""
    own, forgotten = kept_by_this_thread(), []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: forgotten.append(kept_by_this_thread()))

    def fail():
        raise error

    with pytest.raises(type(error)):
        launch(fail, GPU)
    assert forgotten == [launch(kept_by_this_thread, CPU)] and kept_by_this_thread() == own
    assert launch(lambda: 3, GPU) == 3
    forget_recordings(GPU)
    forget_recordings(CPU)
    assert len(forgotten) == 2
