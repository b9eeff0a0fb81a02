"""What nobody has asked for takes the link when that is idle: never in front of a demanded row; and no row is told to
be here before it is."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.transfer import staged
from moe_offload.memory.transfer.staged import PIECES, DeviceTransfer
from tests.fakes.scripted_store import ROW, ScriptedStore
from tests.fakes.streams import SLOW_S, SlowStreams

PIECE = ROW // 8


class Watched(SlowStreams):
    """Notes every copy as it is launched: (what is in its first byte, in the background?)."""

    def __init__(self, delay_s=SLOW_S):
        super().__init__(delay_s)
        self.launched, self.under_way, self.most, self.counted = [], 0, 0, threading.Lock()

    def copy(self, target, source, after, background=False):
        with self.counted:
            self.launched.append((int(source[0]), background))
            self.under_way += background
            self.most = max(self.most, self.under_way)
        return super().copy(target, source, after, background)

    def finish(self, event):
        super().finish(event)
        with self.counted:
            self.under_way = max(0, self.under_way - 1)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(staged, "PIECE_BYTES", PIECE)


@pytest.fixture
def streams():
    return Watched()


@pytest.fixture
def transfer(streams):
    made = DeviceTransfer(streams)
    yield made
    made.close()


@pytest.fixture
def store():
    return HostStore([torch.arange(16, dtype=torch.uint8).repeat_interleave(ROW).view(16, ROW)])


def slots(n):
    return torch.full((n, ROW), 0xFF, dtype=torch.uint8)


def finished(transfer, tickets):
    for ticket in tickets:
        transfer.wait(ticket)
    transfer.streams.finish(transfer.streams.compute.launch(lambda: None))


def test_a_demanded_row_is_launched_though_much_is_queued_in_the_background(transfer, streams, store):
    bank = slots(9)
    ahead = [transfer.start(store, 0, e, bank[e], demanded=False) for e in range(8)]
    while not streams.launched:
        time.sleep(SLOW_S / 10)
    demanded = transfer.start(store, 0, 8, bank[8])
    before = len(streams.launched) - 1
    finished(transfer, [demanded])
    assert streams.launched[before] == (8, False) and before <= PIECES + 1
    assert bank[8].tolist() == [8] * ROW
    finished(transfer, ahead)
    assert [row.tolist() for row in bank] == [[e] * ROW for e in range(9)]
    assert streams.most <= PIECES


def test_nothing_is_launched_in_the_background_while_a_demanded_row_is_copied(transfer, streams, store):
    bank, gate = slots(2), threading.Event()
    streams.beside.launch(lambda: gate.wait(120))  # the link is busy
    demanded = transfer.start(store, 0, 1, bank[1])
    ahead = transfer.start(store, 0, 0, bank[0], demanded=False)
    time.sleep(5 * SLOW_S)
    assert streams.launched == [(1, False)] and not transfer.arrived(ahead)
    gate.set()
    finished(transfer, [demanded, ahead])
    assert len(streams.launched) == 1 + ROW // PIECE and bank[0].tolist() == [0] * ROW


@pytest.mark.parametrize("pieces", [2, 8])  # fewer than threads: all are taken up by then; and more
def test_what_is_hurried_is_demanded_from_then_on(transfer, streams, store, monkeypatch, pieces):
    monkeypatch.setattr(staged, "PIECE_BYTES", ROW // pieces)
    bank, gate = slots(2), threading.Event()
    streams.beside.launch(lambda: gate.wait(120))
    first = transfer.start(store, 0, 1, bank[1])
    ahead = transfer.start(store, 0, 0, bank[0], demanded=False)
    time.sleep(2 * SLOW_S)
    transfer.hurry(ahead)
    gate.set()
    finished(transfer, [first, ahead])
    assert streams.launched == [(1, False)] + [(0, False)] * pieces
    assert [row.tolist() for row in bank] == [[0] * ROW, [1] * ROW]


def test_what_is_cancelled_costs_a_piece_and_not_a_row(transfer, streams, store):
    bank = slots(8)
    ahead = [transfer.start(store, 0, e, bank[e], demanded=False) for e in range(8)]
    transfer.cancel(ahead)
    launched = len(streams.launched)
    assert launched <= 2 * PIECES + 2 and all(ticket.done.is_set() for ticket in ahead)
    streams.finish(streams.compute.launch(lambda: bank.fill_(0xFF)))
    time.sleep(4 * SLOW_S)
    assert (bank == 0xFF).all() and len(streams.launched) == launched


@pytest.mark.parametrize("source", ["staged", "from RAM"])
def test_a_row_has_arrived_when_its_copy_is_over_and_not_before(transfer, streams, store, source):
    store = ScriptedStore() if source == "staged" else store
    bank, gate = slots(1), threading.Event()
    streams.beside.launch(lambda: gate.wait(120))
    ticket = transfer.start(store, 0, 3, bank[0])
    assert ticket.done.wait(120) and not transfer.arrived(ticket), "launched is not copied"
    gate.set()
    finished(transfer, [ticket])
    assert transfer.arrived(ticket)


def test_what_the_device_waited_for_rows_is_told_once_and_to_their_layer(transfer, streams, store):
    bank, gate = slots(2), threading.Event()
    assert transfer.stalled_s(0) == 0
    finished(transfer, [transfer.start(store, 0, 1, bank[1])])
    transfer.stalled_s(0)
    streams.beside.launch(lambda: gate.wait(120))
    ticket = transfer.start(store, 0, 0, bank[0])
    transfer.wait(ticket)  # the host goes on
    assert transfer.stalled_s(0) == 0, "not known yet"
    time.sleep(5 * SLOW_S)
    gate.set()
    streams.finish(streams.compute.launch(lambda: None))
    assert transfer.stalled_s(1) == 0 and transfer.stalled_s(0) >= 5 * SLOW_S and transfer.stalled_s(0) == 0
    again = transfer.start(store, 0, 0, bank[0])
    streams.finish(again.copies[0])
    transfer.wait(again)
    streams.finish(streams.compute.launch(lambda: None))
    assert transfer.stalled_s(0) == 0, "it was here"
