"""Pinning that is refused, undone, interrupted, forked: with a CUDA runtime that is made of Python."""

from __future__ import annotations

import logging
import os
import threading

import pytest
import torch

import moe_offload
from moe_offload import BudgetError, api
from moe_offload.buffers import page_aligned
from moe_offload.errors import ClosedError
from moe_offload.experts import find_experts
from moe_offload.families.tiny import build
from moe_offload.kernels import pinned
from moe_offload.open_stores import open_stores
from moe_offload.stores.host import HostStore
from moe_offload.transfer_device import CudaStreams, DeviceTransfer

from ..offloaded import QWEN, SETTINGS
from ..test_transfer import ROW, ScriptedStore
from ..test_transfer_device import SlowStreams

NO_MEMORY, NOT_REGISTERED = 2, 713


class Runtime:
    """As much of CUDA's as `pinned` asks for. `error` is what the next check of anybody's kernel would report."""

    def __init__(self, most=2**40):
        self.most, self.registered, self.error, self.interrupt_at = most, {}, 0, -1

    def cudaHostRegister(self, address, nbytes, flags):
        assert flags == 3 and address not in self.registered
        if len(self.registered) == self.interrupt_at:
            raise KeyboardInterrupt
        if sum(self.registered.values()) + nbytes > self.most:
            self.error = NO_MEMORY
            return NO_MEMORY
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        if self.registered.pop(address, None) is None:
            self.error = NOT_REGISTERED
            return NOT_REGISTERED
        return 0

    def cudaGetErrorString(self, code):
        return {NO_MEMORY: "out of memory"}[code]

    def cudaGetLastError(self):
        self.error = 0


@pytest.fixture
def cuda(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinned, "_runtime", lambda: runtime)
    monkeypatch.setattr(pinned, "PIECE_BYTES", 2 * 4096)
    monkeypatch.setattr(pinned, "_warned", False)
    return runtime


def layers(n=3, experts=5):
    return [page_aligned(experts * 4096).view(experts, 4096) for _ in range(n)]


def test_all_of_it(cuda):
    rows = layers()
    assert pinned.pin(rows) and sum(cuda.registered.values()) == 3 * 5 * 4096
    assert all(nbytes <= 2 * 4096 for nbytes in cuda.registered.values())
    pinned.unpin(rows)
    assert cuda.registered == {} and cuda.error == 0


def test_refused_in_the_middle(cuda, caplog):
    cuda.most = 7 * 4096  # within the second layer
    rows = layers()
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "moe_offload"):
            assert not pinned.pin(rows)
        assert sum(cuda.registered.values()) == 7 * 4096 and cuda.error == 0, "or the next kernel would report it"
        pinned.unpin(rows)
        assert cuda.registered == {} and cuda.error == 0
    (said,) = caplog.messages
    assert "28.67 KB of 61.44 KB" in said and "out of memory" in said and "ulimit -l" in said


def test_torch_s_own_binding_cannot_drain():
    """If this fails, `pinned._runtime` may be `torch.cuda.cudart()`."""
    binding = getattr(torch._C, "_cudart", None)
    if binding is None:
        pytest.skip("this torch was built without CUDA")
    assert not hasattr(binding, "cudaGetLastError")
    assert callable(pinned._runtime().cudaGetLastError)


# Stores.


@pytest.fixture
def model():
    return build(QWEN, num_hidden_layers=3)


def stores_of(model):
    banks = find_experts(model)
    return open_stores(model, banks, ["host"] * 3, SETTINGS, "cuda:0")


def test_rows_stay_pinned_until_their_store_is_closed(cuda, model):
    (store,) = set(stores_of(model))
    assert store.pinned and cuda.registered
    store.close()
    store.close()
    assert cuda.registered == {}


def test_rows_of_which_some_are_pinned_are_unpinned_all_the_same(cuda, model):
    cuda.most = 20 * 4096
    (store,) = set(stores_of(model))
    assert not store.pinned and cuda.registered
    store.close()
    assert cuda.registered == {} and cuda.error == 0


def test_an_interrupt_between_two_layers_leaves_nothing_pinned(cuda, model):
    cuda.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        stores_of(model)
    assert cuda.registered == {}


@pytest.mark.parametrize("step", ["build_runtime", "_install"])
def test_stores_are_closed_where_the_model_cannot_be_built_on_them(step, model, monkeypatch):
    closed = []
    monkeypatch.setattr(HostStore, "close", lambda self: closed.append(self))

    def fail(*_):
        raise torch.OutOfMemoryError("no room for slots")

    monkeypatch.setattr(api, step, fail)
    with pytest.raises(torch.OutOfMemoryError):
        moe_offload.optimize(model, "1GB", config=SETTINGS, device_map="cpu")
    assert len(closed) == 1


def test_slots_that_do_not_fit_are_a_budget_that_does_not(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moe_offload.assemble.unfilled", full)
    with pytest.raises(BudgetError, match=r"cpu has no room for .* of expert slots.*smaller budget"):
        moe_offload.optimize(model, "1GB", config=SETTINGS, device_map="cpu")


# Staging.


class Streams(SlowStreams):
    pin, unpin = CudaStreams.pin, CudaStreams.unpin


def moved(transfer, expert=1):
    row = torch.zeros(ROW, dtype=torch.uint8)
    return transfer.wait(transfer.start(ScriptedStore(), 0, expert, row)), row


def test_staging_is_unpinned_when_the_transfer_is_closed(cuda):
    transfer = DeviceTransfer(Streams(0))
    moved(transfer)
    assert cuda.registered
    transfer.close()
    assert cuda.registered == {}


def test_staging_that_cannot_be_pinned_still_serves(cuda):
    cuda.most = 0
    transfer = DeviceTransfer(Streams(0))
    assert moved(transfer)[0] == ROW
    transfer.close()
    assert cuda.error == 0


def test_staging_is_unpinned_even_if_the_device_is_lost(cuda):
    class Lost(Streams):
        def drain(self):
            raise RuntimeError("CUDA error: unspecified launch failure")

    transfer = DeviceTransfer(Lost(0))
    moved(transfer)
    with pytest.raises(RuntimeError, match="launch failure"):
        transfer.close()
    assert cuda.registered == {}


def test_staging_whose_pinning_is_interrupted_is_known_to_close(cuda):
    class Interrupted(Streams):
        def pin(self, buffer):
            super().pin(buffer)
            raise KeyboardInterrupt

    transfer = DeviceTransfer(Interrupted(0))
    with pytest.raises(KeyboardInterrupt):
        moved(transfer)
    assert cuda.registered
    transfer.close()
    assert cuda.registered == {}


def test_a_read_that_outlasts_close_is_not_copied_any_more(cuda, monkeypatch):
    """Its slot has gone to somebody else by then."""
    monkeypatch.setattr("moe_offload.transfer.SLOW_S", 0.05)
    gate, row = threading.Event(), torch.zeros(ROW, dtype=torch.uint8)
    transfer = DeviceTransfer(Streams(0))
    ticket = transfer.start(ScriptedStore(lambda expert, part: gate.wait(10)), 0, 1, row)
    while ticket.queued:
        pass
    transfer.close()
    gate.set()
    assert ticket.done.wait(5) and isinstance(ticket.error, ClosedError) and not row.any()


def test_a_forked_process_touches_neither_streams_nor_pins(cuda):
    transfer, rows = DeviceTransfer(Streams(0)), layers()
    moved(transfer)
    pinned.pin(rows)
    holding, forked = threading.Event(), threading.Event()

    def hold():
        with transfer._changed:  # as a reader thread may
            holding.set()
            forked.wait(10)

    threading.Thread(target=hold).start()
    holding.wait(10)
    child = os.fork()
    forked.set()
    if not child:
        transfer.streams.finish = transfer.streams.drain = None  # not callable
        try:
            pinned.unpin(rows)
            transfer.close()
            os._exit(len(cuda.registered) != 10)
        except BaseException:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    transfer.close()
    pinned.unpin(rows)
    assert cuda.registered == {}
