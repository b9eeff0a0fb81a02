"""Recorded steps run in one thread, as their caller would have run them."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_offload.forward.graphs import one_thread
from moe_offload.forward.graphs.one_thread import launch

CPU = torch.device("cpu")


def test_all_threads_launch_in_the_same_one_which_can_keep_recordings():
    from torch._inductor.cudagraph_trees import get_obj, local

    def look():
        return threading.get_ident(), get_obj(local, "tree_manager_containers"), get_obj(local, "tree_manager_locks")

    with ThreadPoolExecutor(2) as threads:
        found = [launch(look, CPU), *threads.map(lambda _: launch(look, CPU), range(4))]
    assert len({(thread, id(kept), id(locks)) for thread, kept, locks in found}) == 1
    assert found[0][0] != threading.get_ident()


@pytest.mark.parametrize("inference", [False, True])
def test_the_modes_are_the_callers(inference):
    with torch.inference_mode(inference):
        made = launch(lambda: torch.ones(1), CPU)
        assert made.is_inference() == inference
        made.add_(1)
    assert not launch(torch.is_grad_enabled, CPU)


def test_an_error_is_the_callers_and_the_thread_goes_on():
    def fail():
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        launch(fail, CPU)
    assert launch(lambda: 3, CPU) == 3


def test_who_gets_the_result_finds_what_was_launched_with_held_by_nobody():
    """A KV cache is lent again only where nobody holds its tensors."""

    class Held:
        pass

    class Slow(one_thread.Future):
        """Gives the caller time to look while the thread is not done with this."""

        def set_result(self, result):
            super().set_result(result)
            looked.wait(10)

    for _ in range(3):
        looked, held = threading.Event(), Held()
        gone = weakref.ref(held)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one_thread, "Future", Slow)
            launch(lambda one=held: None, CPU)
        del held
        assert gone() is None
        looked.set()


def test_an_interrupted_caller_waits_for_the_step(monkeypatch):
    began, over = threading.Event(), []

    class Interrupted(one_thread.Future):
        def result(self, timeout=None):
            began.wait(10)
            raise KeyboardInterrupt

    def step():
        began.set()
        threading.Event().wait(0.2)
        over.append(True)

    monkeypatch.setattr(one_thread, "Future", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(step, CPU)
    assert over == [True]
