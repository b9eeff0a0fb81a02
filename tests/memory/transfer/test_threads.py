"""What every transfer promises, checked on every entry of TRANSFERS; then what reader threads meet: errors of any kind,
reads that hang, forks, the end of the process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest

from moe_offload.errors import ClosedError, ExpertReadError
from moe_offload.memory.devices import usable_kinds
from moe_offload.memory.stores.row_read import RowRead
from moe_offload.memory.transfer import TRANSFERS
from moe_offload.memory.transfer import threads as transfer_threads
from moe_offload.memory.transfer.threads import ThreadTransfer
from tests.fakes.scripted_store import NOTHING, PARTS, ROW, ScriptedStore, row

LONG_S = 120  # longer than anything here takes on a machine that does other things: who waits so long hangs


@pytest.fixture(params=[name for name in TRANSFERS if name in usable_kinds()])
def transfer(request):
    made = TRANSFERS[request.param](request.param)
    yield made
    made.close()


@pytest.fixture
def one_thread():
    made = ThreadTransfer(1)
    yield made
    made.close()


class HeldStore(ScriptedStore):
    """Every part waits for `go`, which is set once `last` is given up. `ended` has the parts that were let go."""

    def __init__(self):
        super().__init__(self.hold)
        self.go, self.ended = threading.Event(), []

    def hold(self, expert, part):
        assert self.go.wait(LONG_S)
        self.ended.append((expert, part))

    def go_once_given_up(self, last):
        threading.Thread(target=lambda: last.done.wait(LONG_S) and self.go.set(), daemon=True).start()


# The contract.


def test_a_row_arrives_whole(transfer):
    store, rows = ScriptedStore(), [row() for _ in range(40)]
    tickets = [transfer.start(store, 0, e, rows[e], demanded=e % 3 > 0) for e in range(40)]
    assert [transfer.wait(ticket) for ticket in tickets] == [ROW] * 40
    assert [bytes(r) for r in rows] == [bytes([e]) * ROW for e in range(40)]
    assert len(store.log) == len(set(store.log)) == 40 * PARTS
    assert transfer.depth() == NOTHING


def test_nothing_is_under_way_once_the_last_row_has_been_waited_for(transfer):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads are stopped between any two steps of theirs
    try:
        for _ in range(60):
            rows = [row() for _ in range(8)]
            tickets = [transfer.start(ScriptedStore(), 0, e, rows[e]) for e in range(8)]
            assert [transfer.wait(ticket) for ticket in tickets] == [ROW] * 8
            assert transfer.depth() == NOTHING
    finally:
        sys.setswitchinterval(interval)


def test_an_error_belongs_to_the_row_that_met_it(transfer):
    def fail(expert, part):
        if (expert, part) == (2, 3):
            raise ExpertReadError("on purpose")

    store, rows = ScriptedStore(fail), [row() for _ in range(5)]
    tickets = [transfer.start(store, 0, e, rows[e]) for e in range(5)]
    with pytest.raises(ExpertReadError, match="on purpose"):
        transfer.wait(tickets[2])
    for e in (0, 1, 3, 4):
        assert transfer.wait(tickets[e]) == ROW and bytes(rows[e]) == bytes([e]) * ROW


def test_after_cancel_nothing_writes_there(transfer):
    held = HeldStore()
    tickets = [transfer.start(held, 0, e + 1, row()) for e in range(20)]
    while not held.log:
        time.sleep(0.001)
    held.go_once_given_up(tickets[-1])
    transfer.cancel(tickets)
    assert sorted(held.ended) == sorted(held.log) and len(held.log) < 20 * PARTS, "what had begun has ended"
    assert transfer.depth() == NOTHING
    again = row()
    assert transfer.wait(transfer.start(ScriptedStore(), 0, 9, again)) == ROW and bytes(again) == b"\x09" * ROW


def test_after_cancel_nothing_writes_there_even_of_a_row_whose_parts_are_read(one_thread):
    """What makes a row out of its parts (a conversion, a copy to a device) writes last, and no part is left by then."""
    finishing, go_on = threading.Event(), threading.Event()
    target = row()

    class Converting(ScriptedStore):
        def begin(self, layer, expert, row):
            def convert():
                finishing.set()
                assert go_on.wait(LONG_S)
                row[:] = bytes([expert]) * ROW
                return ROW

            return RowRead(super().begin(layer, expert, row).parts, convert)

    ticket = one_thread.start(Converting(), 0, 7, target)
    assert finishing.wait(LONG_S)
    canceller = threading.Thread(target=one_thread.cancel, args=([ticket],))
    canceller.start()
    canceller.join(0.1)
    still_waits = canceller.is_alive()
    go_on.set()
    canceller.join(LONG_S)
    assert still_waits and bytes(target) == b"\x07" * ROW


def test_closing_with_rows_under_way(transfer, monkeypatch):
    """They are given up, not waited for: what is under way ends, and no more is read."""
    monkeypatch.setattr(transfer_threads, "SLOW_S", LONG_S)
    held = HeldStore()
    tickets = [transfer.start(held, 0, e, row()) for e in range(50)]
    held.go_once_given_up(tickets[-1])
    transfer.close()
    assert sorted(held.ended) == sorted(held.log) and len(held.log) < 50 * PARTS
    with pytest.raises(ClosedError):
        transfer.wait(tickets[-1])
    with pytest.raises(ClosedError):
        transfer.start(held, 0, 0, row())
    transfer.close()


def test_closing_what_never_ran(transfer):
    transfer.close()
    with pytest.raises(ClosedError):
        transfer.start(ScriptedStore(), 0, 0, row())


# Order.


def held_up(transfer):
    """A transfer of one thread that is busy until the returned event is set."""
    go, busy = threading.Event(), threading.Event()

    def hold(expert, part):
        busy.set()
        go.wait(LONG_S)

    ticket = transfer.start(ScriptedStore(hold), 0, 0, row())
    assert busy.wait(LONG_S)
    return go, ticket


def test_demand_goes_before_what_is_only_expected(one_thread):
    go, first = held_up(one_thread)
    store = ScriptedStore()
    tickets = [one_thread.start(store, 0, e, row(), demanded=e >= 3) for e in range(6)]
    go.set()
    for ticket in (first, *tickets):
        one_thread.wait(ticket)
    assert [e for e, part in store.log if part == 0] == [3, 4, 5, 0, 1, 2]


def test_what_was_expected_and_is_demanded_goes_before_the_rest(one_thread):
    go, first = held_up(one_thread)
    store = ScriptedStore()
    tickets = [one_thread.start(store, 0, e, row(), demanded=False) for e in range(4)]
    one_thread.hurry(tickets[3])
    one_thread.hurry(tickets[3])  # twice is once
    assert [ticket.demanded for ticket in tickets] == [False, False, False, True]
    go.set()
    for ticket in (first, *tickets):
        one_thread.wait(ticket)
    assert [e for e, part in store.log if part == 0] == [3, 0, 1, 2]
    one_thread.hurry(tickets[0])  # too late is nothing
    assert one_thread.depth() == NOTHING


def test_the_parts_of_one_row_are_read_at_once():
    together = threading.Barrier(PARTS)
    made = ThreadTransfer(PARTS)
    assert made.wait(made.start(ScriptedStore(lambda expert, part: together.wait(LONG_S)), 0, 0, row())) == ROW
    made.close()


def test_every_idle_thread_is_woken_for_the_parts_of_one_row():
    together, made = threading.Barrier(PARTS), ThreadTransfer(PARTS)
    made.wait(made.start(ScriptedStore(), 0, 0, row()))
    time.sleep(0.1)  # all of them wait for work again
    assert made.wait(made.start(ScriptedStore(lambda expert, part: together.wait(LONG_S)), 0, 1, row())) == ROW
    made.close()


def test_what_was_cancelled_before_it_was_read_has_moved_nothing(one_thread):
    """`wasted_bytes` counts what was read, not what was asked for."""
    reading, go_on = threading.Event(), threading.Event()
    busy = one_thread.start(ScriptedStore(lambda *_: (reading.set(), go_on.wait(LONG_S))), 0, 1, row())
    assert reading.wait(LONG_S)
    ticket = one_thread.start(ScriptedStore(), 0, 2, row())
    one_thread.cancel([ticket])
    go_on.set()
    assert one_thread.wait(busy) == ROW
    assert (ticket.dropped, ticket.moved, busy.moved) == (PARTS, 0, ROW)


# What a reader thread meets.


def test_a_row_whose_part_failed_is_not_finished(one_thread):
    """What `finish` says of bytes that never came would hide why they did not."""

    class Store(ScriptedStore):
        def begin(self, layer, expert, row):
            return RowRead(super().begin(layer, expert, row).parts, finish)

    def finish():
        raise ValueError("its bytes make no sense")

    def fail(expert, part):
        raise ExpertReadError("on purpose")

    with pytest.raises(ExpertReadError, match="on purpose"):
        one_thread.wait(one_thread.start(Store(fail), 0, 1, row()))


@pytest.mark.parametrize(
    "error", [SystemExit(3), MemoryError(), KeyboardInterrupt(), GeneratorExit(), OSError(5, "EIO")]
)
@pytest.mark.parametrize("when", ["part", "finish"])
def test_whatever_is_raised_in_a_thread_reaches_the_waiter_and_the_thread_lives(one_thread, error, when):
    class Store(ScriptedStore):
        def begin(self, layer, expert, row):
            read = super().begin(layer, expert, row)
            return read if when == "part" else RowRead(read.parts, finish)

    def finish():
        raise error

    def fail(expert, part):
        if when == "part" and part == 1:
            raise error

    ticket = one_thread.start(Store(fail), 0, 1, row())
    with pytest.raises(type(error)):
        one_thread.wait(ticket)
    assert one_thread.wait(one_thread.start(ScriptedStore(), 0, 2, row())) == ROW
    assert one_thread.depth() == NOTHING


def test_a_slow_disk_is_reported_once_with_its_queue(one_thread, monkeypatch, caplog):
    monkeypatch.setattr(transfer_threads, "SLOW_S", 0.01)
    go, first = held_up(one_thread)
    one_thread.start(ScriptedStore(), 7, 3, row())
    real, looks = first.done.wait, []

    def wait(timeout=None):
        looks.append(timeout)
        if len(looks) < 4:
            return real(timeout)
        go.set()  # it has been slow for three looks
        return real(LONG_S)

    monkeypatch.setattr(first.done, "wait", wait)
    with caplog.at_level(logging.WARNING, "moe_offload"):
        assert one_thread.wait(first) == ROW
    (record,) = caplog.records
    assert (
        "layer 0, expert 0: waited" in record.message and "queued: 2 demanded rows" in record.message
    )  # one of them begun


def test_a_read_that_never_ends_is_an_error_and_nothing_hangs(one_thread, monkeypatch):
    monkeypatch.setattr(transfer_threads, "SLOW_S", 0.02)
    monkeypatch.setattr(transfer_threads, "TIMEOUT_S", 0.1)
    go, first = held_up(one_thread)
    with pytest.raises(ExpertReadError, match=r"has not arrived after .* reading: layer 0, expert 0 for"):
        one_thread.wait(first)
    one_thread.cancel([first])  # gives up on it as well
    with pytest.raises(ClosedError):  # the read may still write: nothing is ever loaded there again
        one_thread.start(ScriptedStore(), 0, 1, row())
    (thread,) = one_thread._threads
    one_thread.close()
    assert thread.is_alive(), "to close is not to wait for it"
    go.set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_ctrl_c_while_cancelling_still_waits_for_the_reads_under_way(one_thread, monkeypatch, error):
    """Or whatever the handler of an alarm raises."""
    go, first = held_up(one_thread)
    real, calls = first.done.wait, []

    def wait(timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            go.set()
            raise error
        return real(timeout)

    monkeypatch.setattr(first.done, "wait", wait)
    with pytest.raises(error):
        one_thread.cancel([first])
    assert len(calls) == 2 and first.done.is_set()


def test_ctrl_c_while_a_thread_is_woken_leaves_none_asleep_for_good(one_thread, monkeypatch):
    """What notify() leaves of itself then is taken for the thread the next time, which slept on: a hang of minutes."""

    class Waiter:
        """The lock that a thread waits on. The first to release it is interrupted once the thread waits on another."""

        def __init__(self, lock):
            self.lock, self.left = lock, 1

        def release(self):
            self.lock.release()
            if self.left:
                self.left = 0
                while waiters[-1] is self:
                    one_thread._changed.wait(0.01)
                raise KeyboardInterrupt

    monkeypatch.setattr("tests.fakes.scripted_store.PARTS", 1)
    one_thread.wait(one_thread.start(ScriptedStore(), 0, 0, row()))
    waiters = one_thread._changed._waiters
    while not waiters:
        time.sleep(0.001)
    waiters[0] = Waiter(waiters[0])
    with pytest.raises(KeyboardInterrupt):
        one_thread.start(ScriptedStore(), 0, 1, row())
    monkeypatch.setattr(transfer_threads, "SLOW_S", 0.5)
    monkeypatch.setattr(transfer_threads, "TIMEOUT_S", 2.0)
    assert one_thread.wait(one_thread.start(ScriptedStore(), 0, 2, row())) == ROW


def test_ctrl_c_while_a_row_is_waited_for_leaves_no_lock_behind(one_thread):
    """At every place in turn where Python may raise it; an Event's own lock stayed locked, and the next call hung."""

    places = (transfer_threads.__file__.rpartition("/")[0], threading.__file__)

    class Interrupt:
        def __init__(self, at):
            self.at, self.seen = at, 0

        def __call__(self, frame, event, arg):
            if event in ("call", "c_return") and frame.f_code.co_filename.startswith(places):
                self.seen += 1
                if self.seen == self.at:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

    at, interrupted = 0, True
    while interrupted:
        at, interrupted = at + 1, False
        waited = one_thread.start(ScriptedStore(lambda expert, part: time.sleep(0.001)), 0, 1, row())
        sys.setprofile(Interrupt(at))
        try:
            one_thread.wait(waited)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.setprofile(None)
        ended = threading.Thread(target=one_thread.cancel, args=([waited],), daemon=True)
        ended.start()
        ended.join(LONG_S)
        assert not ended.is_alive(), at
    assert at > 4


def test_an_idle_thread_does_not_hold_on_to_the_memory_of_its_last_row(one_thread):
    class Memory(bytearray):
        pass

    class Converting(ScriptedStore):
        def begin(self, layer, expert, row):
            return RowRead([lambda: None], lambda: len(row))

    memory = Memory(ROW)
    gone = weakref.ref(memory)
    one_thread.wait(one_thread.start(Converting(), 0, 1, memoryview(memory)))
    del memory
    deadline = time.monotonic() + LONG_S
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone() is None


def test_a_thread_may_close_what_it_works_for():
    """The last reference to a model may go in any thread, and its end closes it."""
    made = ThreadTransfer(1)
    errors = []

    def close(expert, part):
        try:
            made.close()
        except RuntimeError as error:
            errors.append(error)

    ticket = made.start(ScriptedStore(close), 0, 1, row())
    assert ticket.done.wait(LONG_S) and not errors and made._closed


def test_threads_start_with_the_first_row_and_end_with_close():
    before = threading.active_count()
    made = ThreadTransfer()
    assert threading.active_count() == before
    made.wait(made.start(ScriptedStore(), 0, 1, row()))
    assert threading.active_count() > before
    made.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_process_is_told_instead_of_hanging(one_thread):
    one_thread.wait(one_thread.start(ScriptedStore(), 0, 1, row()))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            one_thread.start(ScriptedStore(), 0, 2, row())
        except ClosedError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            one_thread.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert one_thread.wait(one_thread.start(ScriptedStore(), 0, 3, row())) == ROW


def test_a_process_ends_with_reads_under_way():
    script = """
        import threading
        from moe_offload.memory.stores.row_read import RowRead
        from moe_offload.memory.transfer.threads import ThreadTransfer
        class Store:
            def begin(self, layer, expert, row):
                return RowRead([threading.Event().wait], lambda: 0)  # a read that never ends
        transfer = ThreadTransfer()
        for e in range(20):
            transfer.start(Store(), 0, e, memoryview(bytearray(8)))
        print("leaving")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LONG_S)
    assert (done.returncode, done.stdout.strip()) == (0, "leaving"), done.stderr
