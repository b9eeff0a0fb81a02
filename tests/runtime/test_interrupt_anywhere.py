"""Ctrl-C at every place in turn where Python may raise it in our code, reads under way; and every event after it gets
the right rows. (tests/whole/test_interrupt.py does so to a whole model, at random.)"""

from __future__ import annotations

import sys
import time
from typing import ClassVar

import pytest
import torch

import moe_offload
from moe_offload.errors import ExpertReadError
from moe_offload.memory.stores.row_read import RowRead
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.memory.transfer.threads import ThreadTransfer
from tests.fakes.fault_store import E, FaultStore, assert_sound, decode, expected, make, prefill, run
from tests.fakes.streams import InstantStreams

OURS = moe_offload.__path__[0]
LATE_S = 0.0003


class LateStore(FaultStore):
    """A row is written some time after it has been asked for."""

    late_s: ClassVar[dict[int, float]] = {}

    def begin(self, layer, expert, row):
        read = super().begin(layer, expert, row)
        return RowRead([lambda: time.sleep(self.late_s.get(expert, LATE_S))], read.finish)


class Interrupt:
    """KeyboardInterrupt at the `at`th place, counted from 1, within `moe_offload` in this thread: where a function
    begins, or one written in C has returned."""

    def __init__(self, at=0):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, arg):
        ours = frame.f_code.co_filename.startswith((OURS, "<string>"))  # dataclasses write their __init__ there
        if event in ("call", "c_return") and ours:
            self.seen += 1
            if self.seen == self.at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


def long_prompt(last=E):
    return list(range(last)) * 3


def before(runtime):
    """Of everything a little: rows read ahead and claimed, guesses right and wrong, a prompt past the slots."""
    first, second = runtime.layers
    prefill(first, long_prompt())
    prefill(second, long_prompt(6))
    second.prefetch(torch.tensor([1, 2]))
    decode(first, [3, 4])
    decode(second, [1, 5])


def after(runtime):
    for ids in ([3, 4], [1, 5, 6], long_prompt()):
        for index, layer in enumerate(runtime.layers):
            assert torch.equal(run(layer, ids), expected(index, ids))
            assert_sound(layer)
            counters = layer.counters  # a profile whose uses are more than its tokens allow cannot be saved
            assert sum(counters.counts) <= counters.tokens * layer.moe.top_k


def made(kind, slots=3):
    transfer = DeviceTransfer(InstantStreams()) if kind == "streams" else ThreadTransfer()
    runtime, _ = make(slots, LateStore(), scratch_rows=3, transfer=transfer)
    runtime.guesses.trial.skip = lambda: None
    for layer in runtime.layers:
        decode(layer, [0, 1])
    return runtime


@pytest.mark.parametrize("kind", ["threads", "streams"])
@pytest.mark.parametrize("every", [pytest.param(5, marks=pytest.mark.long), 47])
def test_whatever_is_interrupted_the_next_events_get_their_rows(kind, every):
    with Interrupt() as places:
        before(made(kind))
    assert places.seen > 1000
    interrupted = 0
    for at in range(1, places.seen, every):
        runtime = made(kind)
        try:
            with Interrupt(at):
                before(runtime)
        except KeyboardInterrupt:
            interrupted += 1
        after(runtime)
        runtime.close()
    assert interrupted > 800 // every  # how many places there are depends on when rows arrive


# What it has found, one by one.


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture(params=["threads", "streams"])
def runtime(request):
    one = made(request.param)
    yield one
    one.close()


def test_between_making_room_and_asking_for_the_rows(runtime, monkeypatch):
    """The loads were taken for rows under way, and the next event read slots that nothing had been loaded into."""
    monkeypatch.setattr(runtime.layers[0].arrivals, "claim_guesses", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(runtime.layers[0], [3, 4])
    monkeypatch.undo()
    after(runtime)


def test_loads_that_nobody_knows_of_are_given_back_by_the_next_event(runtime):
    """Interrupted twice, an event leaves loads that were never asked for; they are not on their way."""
    runtime.layers[0].cache.lookup({3: 1, 4: 1})
    decoded = decode(runtime.layers[0], [3, 4])
    assert torch.equal(decoded, expected(0, [3, 4]))
    after(runtime)


def test_between_asking_for_a_row_and_noting_it(runtime, monkeypatch):
    """Its slot was given to another expert, and then the row arrived."""
    first = runtime.layers[0]
    first.store.late_s = {3: 0.1}
    monkeypatch.setattr("moe_offload.runtime.in_flight.Arrival", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(first, [3, 4])
    monkeypatch.undo()
    for _ in range(2):
        assert torch.equal(decode(first, [5, 6]), expected(0, [5, 6]))
        time.sleep(0.2)
    after(runtime)


def test_between_asking_for_a_row_ahead_and_noting_it(runtime, monkeypatch):
    """It was read into scratch that was somebody else's by then."""
    first, second = runtime.layers
    second.store.late_s = dict.fromkeys(range(E), 0.02)
    monkeypatch.setattr("moe_offload.memory.scratch.Held", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prefill(first, long_prompt())
    assert first.arrivals.transfer.under_way() == []
    monkeypatch.undo()
    after(runtime)


def test_in_the_middle_of_making_room(runtime):
    """Slots that had been given away were lost, and soon no event fitted any more."""
    cache = runtime.layers[0].cache

    class Free(list):
        def pop(self, *_):
            super().pop()
            raise KeyboardInterrupt

    cache.free = Free(cache.free)
    with pytest.raises(KeyboardInterrupt):
        decode(runtime.layers[0], [3, 4])
    after(runtime)


@pytest.mark.parametrize("kind", ["threads", "streams"])
def test_a_guess_that_fails_takes_back_those_after_it(kind, monkeypatch):
    """They belong to another layer than the event that fails, and were taken for rows under way there."""
    runtime = made(kind, slots=5)
    first, second = runtime.layers
    real = second.arrivals.transfer.start

    def start(store, layer, *args, **options):
        if layer == 1:
            raise ExpertReadError("on purpose")
        return real(store, layer, *args, **options)

    monkeypatch.setattr(second.arrivals.transfer, "start", start)
    second.prefetch(torch.tensor([3, 4]))
    with pytest.raises(ExpertReadError):
        decode(first, [3, 4])
    monkeypatch.undo()
    after(runtime)
    runtime.close()


def test_while_what_is_claimed_waits_for_what_is_dropped(runtime, monkeypatch):
    """Rows that were claimed then went on being read into scratch that was free for others."""
    first, second = runtime.layers
    prefill(first, long_prompt())
    scratch, transfer = second.arrivals.scratch, second.arrivals.transfer
    while not all(held.ticket.done.is_set() for held in scratch.ahead.values()):
        time.sleep(LATE_S)
    claimed = next(e for e in range(E) if e not in second.cache.resident() and e not in scratch.ahead)
    second.store.late_s = {claimed: 0.2}
    scratch.read_ahead(1, second.store, second.moe.layout, claimed, 0, lambda nbytes: None)
    ticket, real, calls = scratch.ahead[claimed].ticket, transfer.cancel, []

    def cancel(given):
        real(given)
        calls.append(given)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "cancel", cancel)
    with pytest.raises(KeyboardInterrupt):
        decode(second, [claimed, 0])
    assert ticket.done.is_set()
    monkeypatch.undo()
    after(runtime)


def test_between_what_is_claimed_and_what_is_looked_up(runtime, monkeypatch):
    """The first event after it may be another layer's, which streams through scratch that was still being written."""
    first, second = runtime.layers
    first.store.late_s = dict.fromkeys(range(E), 0.05)
    prefill(first, long_prompt())
    tickets = [held.ticket for held in second.arrivals.scratch.ahead.values()]
    assert tickets and not all(ticket.done.is_set() for ticket in tickets)
    real = second._event

    def event(ids_P):
        real(ids_P)
        raise KeyboardInterrupt

    monkeypatch.setattr(second, "_event", event)
    for step in (prefill, decode):
        with pytest.raises(KeyboardInterrupt):
            step(second, [0, 1] if step is decode else long_prompt())
        assert all(ticket.done.is_set() for ticket in tickets) and not second.arrivals.under_way
    monkeypatch.undo()
    after(runtime)


@pytest.mark.parametrize("left", ["claimed", "without a slot", "in a slot"])
def test_an_event_begins_with_nothing_on_its_way(runtime, left):
    """Whatever an earlier one has left that was interrupted before anybody could take it back."""
    first, second = runtime.layers
    first.store.late_s = dict.fromkeys(range(E), 0.05)
    if left == "claimed":
        prefill(first, long_prompt())
        second.arrivals.begin(range(E))
        tickets = [held.ticket for held in second.arrivals.held.values()]
    else:
        load = second.cache.lookup({7: 1})[0] if left == "in a slot" else None
        second.arrivals.send(7, load, 0 if load is None else -1)
        tickets = [arrival.ticket for arrival in second.arrivals.awaited]
    assert tickets and not all(ticket.done.is_set() for ticket in tickets)
    second.arrivals.begin([0])
    assert all(ticket.done.is_set() for ticket in tickets) and not second.arrivals.under_way
    after(runtime)


def test_into_what_is_dropped_nothing_is_written_any_more(runtime):
    first, second = runtime.layers
    first.store.late_s = dict.fromkeys(range(E), 0.05)
    prefill(first, long_prompt())
    tickets = [held.ticket for held in second.arrivals.scratch.ahead.values()]
    assert tickets and not all(ticket.done.is_set() for ticket in tickets)
    second.arrivals.scratch.drop()
    assert all(ticket.done.is_set() for ticket in tickets)
