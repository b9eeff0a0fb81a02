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


class Manager:
    """Inductor's, as far as its own code needs one to record and to replay; it says what it was asked to do."""

    def __init__(self, device_index):
        self.is_shut_down = False

    def shutdown(self):
        self.is_shut_down = True

    def add_function(self, model, *_, **__):
        recorded = object()

        def replay(inputs):
            assert not self.is_shut_down, "Running CUDAGraph after shutdown"
            return "replayed", recorded

        return replay, ("recorded", recorded)


@pytest.fixture
def step(monkeypatch):
    """What Inductor makes of a step that is to be recorded, on a machine without CUDA."""
    monkeypatch.setattr(cudagraph_trees, "CUDAGraphTreeManager", Manager)
    monkeypatch.setattr(cudagraph_trees, "get_input_idxs_to_check", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    options = {"device_index": 0, "is_backward": False, "is_inference": True}
    return cudagraph_trees.cudagraphify_impl(lambda inputs: None, [], [], **options)


def run(step):
    return launch(lambda: step([]), GPU)[0]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt(), None])
def test_after_an_error_or_ctrl_c_all_is_recorded_anew(step, error, elsewhere):
    """It may have come in the middle of a recording; and what Inductor has compiled would go on with what was freed."""

    def fail():
        raise error

    def forget():
        if error is None:
            return forget_recordings()
        with pytest.raises(type(error)):
            launch(fail, GPU)

    with ThreadPoolExecutor(1) as another:
        assert [run(step) for _ in range(3)] == ["recorded", "replayed", "replayed"]
        manager = launch(lambda: cudagraph_trees.get_manager(0), GPU)
        another.submit(forget).result() if elsewhere else forget()
        assert manager.is_shut_down
        assert [another.submit(run, step).result(), run(step), run(step)] == ["recorded", "replayed", "replayed"]


def test_what_records_for_others_is_inductors_own(step):
    own = cudagraph_trees.cudagraphify
    run(step)
    assert cudagraph_trees.cudagraphify is own
