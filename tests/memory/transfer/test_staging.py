"""Staging memory that cannot be pinned, is interrupted, closed late, or on a device that is lost; and forked processes,
in which the locks of threads that are not there may be held for ever."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
import time
import weakref

import pytest
import torch

from moe_offload.apps.families.tiny import build
from moe_offload.errors import ClosedError
from moe_offload.experts import find_experts
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.stores.spill import spill_layers
from moe_offload.memory.transfer import pinned
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.memory.transfer.streams import CudaStreams
from moe_offload.memory.transfer.threads import ThreadTransfer
from tests.fakes.cudart import PAGE, cuda  # noqa: F401
from tests.fakes.fault_store import decode, make
from tests.fakes.offloaded import QWEN
from tests.fakes.scripted_store import ROW, ScriptedStore
from tests.fakes.streams import SlowStreams

forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*"),
]


class Streams(SlowStreams):
    pin, unpin, _warned = CudaStreams.pin, CudaStreams.unpin, False

    def __init__(self):
        super().__init__(delay_s=0)


def slot():
    return torch.zeros(ROW, dtype=torch.uint8)


def moved(transfer, expert=1):
    row = slot()
    return transfer.wait(transfer.start(ScriptedStore(), 0, expert, row)), row


def test_staging_is_unpinned_when_the_transfer_is_closed(cuda):  # noqa: F811
    transfer = DeviceTransfer(Streams())
    moved(transfer)
    assert cuda.registered
    transfer.close()
    assert cuda.registered == {}


def test_a_closed_store_of_pinned_rows_holds_none_of_them(cuda):  # noqa: F811
    rows = torch.ones(2, PAGE, dtype=torch.uint8)
    gone, held = weakref.ref(rows), {0: rows}
    store = HostStore([rows], [0], functools.partial(pinned.unpin_layers, held, "cuda:0"))
    del rows, held
    store.close()
    gc.collect()
    assert gone() is None


def test_staging_that_cannot_be_pinned_still_serves(cuda):  # noqa: F811
    cuda.most = 0
    transfer = DeviceTransfer(Streams())
    assert moved(transfer)[0] == ROW
    transfer.close()
    assert cuda.error == 0


class Lost(Streams):
    def drain(self):
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_staging_is_unpinned_even_if_the_device_is_lost(cuda):  # noqa: F811
    transfer = DeviceTransfer(Lost())
    moved(transfer)
    with pytest.raises(RuntimeError, match="launch failure"):
        transfer.close()
    assert cuda.registered == {}


def test_a_runtime_is_closed_even_if_its_device_is_lost(cuda):  # noqa: F811
    runtime, store = make(transfer=DeviceTransfer(Lost()))
    decode(runtime.layers[0], [0, 1])
    with pytest.raises(RuntimeError, match="launch failure"):
        runtime.close()
    assert runtime.closed and store.closed == 1 and runtime.layers[0].slots.bytes.numel() == 0


def test_staging_whose_pinning_is_interrupted_is_known_to_close(cuda):  # noqa: F811
    class Interrupted(Streams):
        def pin(self, buffer):
            super().pin(buffer)
            raise KeyboardInterrupt

    transfer = DeviceTransfer(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        moved(transfer)
    assert cuda.registered
    transfer.close()
    assert cuda.registered == {}


def test_staging_whose_last_copy_cannot_be_waited_for_is_not_lost(cuda):  # noqa: F811
    transfer = DeviceTransfer(Streams(), staging_rows=1)
    moved(transfer)
    real, transfer.streams.finish = transfer.streams.finish, interrupt
    with pytest.raises(KeyboardInterrupt):
        moved(transfer)
    transfer.streams.finish = real
    assert moved(transfer, 2)[0] == ROW
    transfer.close()


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_staging_of_a_row_that_could_not_be_queued_is_not_lost(cuda, monkeypatch):  # noqa: F811
    def fail(*_):
        raise RuntimeError("can't start new thread")

    transfer = DeviceTransfer(Streams(), staging_rows=1)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="new thread"):
        patched.setattr(transfer, "_start_threads", fail)
        moved(transfer)
    assert len(transfer._spare[ROW]) == 1
    transfer.close()


def test_rows_out_of_ram_that_nobody_needed_count_as_moved(cuda):  # noqa: F811
    transfer = DeviceTransfer(Streams())
    ticket = transfer.start(HostStore([torch.ones(2, ROW, dtype=torch.uint8)]), 0, 1, slot())
    assert ticket.moved == ROW
    transfer.close()


def test_a_read_that_outlasts_close_is_not_copied_any_more(cuda, monkeypatch):  # noqa: F811
    """Its slot has gone to somebody else by then."""
    monkeypatch.setattr("moe_offload.memory.transfer.threads.SLOW_S", 0.05)
    begun, gate, row = threading.Event(), threading.Event(), slot()

    def hang(expert, part):
        begun.set()
        gate.wait(120)

    transfer = DeviceTransfer(Streams(), reader_threads=4)
    ticket = transfer.start(ScriptedStore(hang), 0, 1, row)
    while ticket.queued:
        begun.wait(1)
    transfer.close()
    gate.set()
    assert ticket.done.wait(120) and isinstance(ticket.error, ClosedError)
    time.sleep(0.05)  # a copy would be done by now
    assert not row.any()


def test_what_hung_and_was_given_up_is_unpinned_by_close(cuda, monkeypatch):  # noqa: F811
    """`cancel` refuses every row from then on; to close is more than that."""
    for module in ("threads", "staged"):
        monkeypatch.setattr(f"moe_offload.memory.transfer.{module}.TIMEOUT_S", 0.05)
    monkeypatch.setattr("moe_offload.memory.transfer.threads.SLOW_S", 0.05)
    begun, gate = threading.Event(), threading.Event()

    def hang(expert, part):
        begun.set()
        gate.wait(120)

    transfer = DeviceTransfer(Streams(), reader_threads=1)
    ticket = transfer.start(ScriptedStore(hang), 0, 1, slot())
    assert begun.wait(120)
    transfer.cancel([ticket])
    assert transfer._closed and cuda.registered
    gate.set()
    (thread,) = transfer._threads
    thread.join(120)
    assert not thread.is_alive(), "a thread that can end does"
    transfer.close()
    assert cuda.registered == {}


def test_a_copy_is_waited_for_by_the_next_kernel_though_its_cancelling_is_interrupted(cuda, monkeypatch):  # noqa: F811
    transfer, row, seen = DeviceTransfer(SlowStreams()), slot(), []
    ticket = transfer.start(HostStore([torch.ones(2, ROW, dtype=torch.uint8)]), 0, 1, row)
    monkeypatch.setattr(ThreadTransfer, "cancel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        transfer.cancel([ticket])
    transfer.streams.finish(transfer.streams.compute.launch(lambda: seen.append(row.tolist())))
    assert seen == [[1] * ROW], "or it would be copied over what the kernel writes there"
    transfer.close()


# Forked processes.


def held(lock):
    """Hold `lock` as a thread may, while the process is forked; returns what lets it go."""
    holding, let_go = threading.Event(), threading.Event()

    def hold():
        with lock:
            holding.set()
            let_go.wait(120)

    threading.Thread(target=hold, daemon=True).start()
    assert holding.wait(120)
    return let_go.set


def forked(act, seconds=120.0):
    """Whether `act`, in a forked process, returns True, and soon."""
    child = os.fork()
    if not child:
        code = 99
        with contextlib.suppress(BaseException):
            code = 0 if act() else 1
        os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


class TestForked:
    pytestmark = forks

    def test_it_touches_neither_streams_nor_pins(self, cuda):  # noqa: F811
        transfer, rows = DeviceTransfer(Streams()), {0: torch.zeros(5, PAGE, dtype=torch.uint8)}
        moved(transfer)
        pinned.pin_layers(rows, "cuda:0")
        let_go, before = held(transfer._changed), len(cuda.registered)

        def close():
            transfer.streams.finish = transfer.streams.drain = transfer.streams.current = None  # not callable
            torch.cuda.device = None
            pinned.unpin_layers(rows, "cuda:0")
            transfer.close()
            return len(cuda.registered) == before

        assert forked(close)
        let_go()
        transfer.close()
        pinned.unpin_layers(rows, "cuda:0")
        assert cuda.registered == {}

    def test_it_waits_for_no_thread_that_is_not_there(self):
        gate = threading.Event()
        transfer = ThreadTransfer(1)
        ticket = transfer.start(ScriptedStore(lambda expert, part: gate.wait(120)), 0, 1, memoryview(bytearray(ROW)))
        late = transfer.start(ScriptedStore(), 0, 2, memoryview(bytearray(ROW)), demanded=False)
        let_go = held(transfer._changed)

        def use():
            transfer.hurry(late)
            transfer.get_going()
            transfer.cancel([ticket, late])
            with pytest.raises(ClosedError, match="forked"):
                transfer.start(ScriptedStore(), 0, 3, memoryview(bytearray(ROW)))
            return True

        assert forked(use)
        let_go()
        gate.set()
        assert transfer.wait(late) == ROW
        transfer.close()

    def test_a_model_is_closed_there_though_a_forward_ran(self):
        runtime, store = make()
        let_go = held(runtime.lock)

        def close():
            runtime.close()
            return runtime.closed and store.closed == 1

        assert forked(close)
        let_go()
        assert not runtime.closed
        runtime.close()

    def test_files_are_closed_there_though_a_thread_was_reading(self, tmp_path):
        moe_layers = find_experts(build(QWEN, num_hidden_layers=1))
        store = spill_layers(moe_layers, moe_layers, tmp_path)
        let_go = held(store._lock)
        store._reading = 1

        def close():
            store.close()
            return store.files == []

        assert forked(close)
        let_go()
        assert len(store.files) == 1
        store._reading = 0
        store.close()
