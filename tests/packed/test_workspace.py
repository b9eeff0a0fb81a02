"""Memory of each thread, which any thread may give back."""

from __future__ import annotations

import threading
import weakref

import torch

from moe_offload.packed import workspace


def in_thread(work) -> threading.Event:
    """Run `work` in a thread that lives until the event is set."""
    done, end = threading.Event(), threading.Event()

    def run():
        work()
        done.set()
        end.wait(10)

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(10)
    return end


def test_closing_frees_what_other_threads_have_borrowed():
    held: list[weakref.ref] = []
    end = in_thread(lambda: held.append(weakref.ref(workspace.borrow((100,), torch.float32)._base)))
    assert held[0]() is not None
    workspace.give_back()
    assert held[0]() is None
    end.set()


def test_what_is_in_use_stays():
    view = workspace.borrow((100,), torch.float32).fill_(3)
    in_thread(workspace.give_back).set()
    assert view.eq(3).all()
    assert workspace.borrow((100,), torch.float32).data_ptr() != view.data_ptr()


def test_a_thread_that_ends_takes_its_piece_along():
    before = len(workspace._pieces)
    end = in_thread(lambda: workspace.borrow((100,), torch.float32))
    assert len(workspace._pieces) == before + 1
    end.set()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(0.5)
    assert len(workspace._pieces) == before
