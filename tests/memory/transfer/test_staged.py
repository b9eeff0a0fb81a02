"""Rows into a device with streams of its own, which are slow on purpose: no kernel reads a row before it is there, none
finds it replaced while it reads, and no staging is filled again before it has been copied out of."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from moe_offload.errors import ExpertReadError
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.transfer.staged import DeviceTransfer
from tests.fakes.scripted_store import ROW, ScriptedStore
from tests.fakes.streams import SLOW_S, SlowStreams


@pytest.fixture
def streams():
    return SlowStreams()


@pytest.fixture
def transfer(streams):
    made = DeviceTransfer(streams, staging_rows=2)
    yield made
    made.close()


def slots(n):
    return torch.full((n, ROW), 0xFF, dtype=torch.uint8)


def reader(streams, slot, seen, slow_s=0.0):
    """A kernel that reads the whole slot, and takes its time."""

    def kernel():
        first = slot[: ROW // 2].clone()
        time.sleep(slow_s)
        seen.append(sorted({*first.tolist(), *slot[ROW // 2 :].tolist()}))

    return streams.compute.launch(kernel)


def in_ram(experts=8):
    rows = torch.arange(experts, dtype=torch.uint8).repeat_interleave(ROW).view(experts, ROW)
    return HostStore([rows])


@pytest.fixture(params=["staged", "from RAM"])
def store(request):
    return ScriptedStore() if request.param == "staged" else in_ram()


def test_a_kernel_after_wait_sees_the_whole_row(transfer, streams, store):
    bank, seen = slots(8), []
    tickets = [transfer.start(store, 0, e, bank[e], demanded=e % 2 == 0) for e in range(8)]
    for e, ticket in enumerate(tickets):
        assert transfer.wait(ticket) == ROW
        last = reader(streams, bank[e], seen)
    streams.finish(last)
    assert seen == [[e] for e in range(8)]


def test_a_slot_is_not_filled_before_its_last_reader_has_passed(transfer, streams, store):
    bank, seen = slots(1), []
    transfer.wait(transfer.start(store, 0, 1, bank[0]))
    for e in (2, 3, 4):
        reader(streams, bank[0], seen, slow_s=3 * SLOW_S)  # it has been launched, and has hardly begun
        transfer.wait(transfer.start(store, 0, e, bank[0]))
    streams.finish(reader(streams, bank[0], seen))
    assert seen == [[1], [2], [3], [4]]


def test_staging_is_not_filled_before_it_has_been_copied_out_of(streams):
    transfer = DeviceTransfer(streams, staging_rows=1)
    bank = slots(6)
    for ticket in [transfer.start(ScriptedStore(), 0, e, bank[e]) for e in range(6)]:
        transfer.wait(ticket)
    streams.finish(streams.mark())
    assert [sorted(set(row.tolist())) for row in bank] == [[e] for e in range(6)]
    assert len(transfer._spare[ROW]) == 1
    transfer.close()


def test_what_is_cancelled_after_it_is_done_gives_its_staging_back_once(transfer):
    bank = slots(2)
    tickets = [transfer.start(ScriptedStore(), 0, e, bank[e]) for e in range(2)]
    for ticket in tickets:
        transfer.wait(ticket)
    transfer.cancel(tickets)
    transfer.cancel(tickets)
    spare = transfer._spare[ROW]  # the second row may have found that of the first
    assert len({id(staging) for staging in spare}) == len(spare) == transfer._made[ROW]


def test_rows_in_ram_need_no_thread(transfer):
    bank = slots(1)
    transfer.wait(transfer.start(in_ram(), 0, 3, bank[0]))
    assert not transfer._threads and not transfer._made


def test_what_is_cancelled_is_not_written_any_more(transfer, streams, store):
    bank = slots(8)
    tickets = [transfer.start(store, 0, e, bank[e]) for e in range(8)]
    transfer.cancel(tickets)
    streams.finish(streams.compute.launch(lambda: bank.fill_(0xFF)))
    time.sleep(4 * SLOW_S)
    assert (bank == 0xFF).all()
    assert transfer.wait(transfer.start(store, 0, 1, bank[0])) == ROW, "and the next one works"


def test_a_row_that_fails_gives_its_staging_back(streams):
    def fail(expert, part):
        if expert == 1:
            raise ExpertReadError("no such luck")

    transfer, store, bank = DeviceTransfer(streams, staging_rows=1), ScriptedStore(fail), slots(1)
    for _ in range(3):
        with pytest.raises(ExpertReadError, match="no such luck"):
            transfer.wait(transfer.start(store, 0, 1, bank[0]))
    assert transfer.wait(transfer.start(store, 0, 2, bank[0])) == ROW
    transfer.close()


def test_a_row_that_no_store_begins_gives_its_staging_back(streams, monkeypatch):
    transfer, store = DeviceTransfer(streams, staging_rows=1), ScriptedStore()
    with monkeypatch.context() as patched:
        patched.setattr(store, "begin", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            transfer.start(store, 0, 1, slots(1)[0])
    assert [len(spare) for spare in transfer._spare.values()] == [1]
    assert transfer.wait(transfer.start(store, 0, 2, slots(1)[0])) == ROW
    transfer.close()


def test_staging_that_never_comes_free_is_an_error_that_names_the_queue(streams, monkeypatch):
    monkeypatch.setattr("moe_offload.memory.transfer.staged.TIMEOUT_S", 0.2)
    gate = threading.Event()
    transfer, store = DeviceTransfer(streams, staging_rows=1), ScriptedStore(lambda expert, part: gate.wait(120))
    ticket = transfer.start(store, 0, 1, slots(1)[0])
    with pytest.raises(ExpertReadError, match="reading: layer 0, expert 1"):
        transfer.start(store, 0, 2, slots(1)[0])
    gate.set()
    assert transfer.wait(ticket) == ROW
    transfer.close()
