"""Memory of each thread, which any thread may give back."""

from __future__ import annotations

import threading

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
    before = set(workspace._pieces)
    end = in_thread(lambda: workspace.borrow_workspace((100,), torch.float32))
    [new] = set(workspace._pieces) - before
    piece = workspace._pieces[new]()
    assert piece.memory.numel() == 400
    workspace.free_workspace()
    assert piece.memory.numel() == 0
    end.set()


def test_what_is_in_use_stays():
    view = workspace.borrow_workspace((100,), torch.float32).fill_(3)
    in_thread(workspace.free_workspace).set()
    assert view.eq(3).all()
    assert workspace.borrow_workspace((100,), torch.float32).data_ptr() != view.data_ptr()


def test_a_thread_that_ends_takes_its_piece_along():
    before = set(workspace._pieces)
    thread = threading.Thread(target=lambda: workspace.borrow_workspace((100,), torch.float32))
    thread.start()
    thread.join()
    assert not set(workspace._pieces) - before
