"""Ctrl-C, in the middle of anything: KeyboardInterrupt at once, and the next generate says what it always says."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch

from moe_offload import ExpertReadError
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.stores.row_read import RowRead
from tests.fakes.offloaded import offloaded, resident, say


@pytest.fixture
def slow(monkeypatch):
    """Every row takes a millisecond or two."""
    real = HostStore.begin

    def begin(self, layer, expert, row):
        read = real(self, layer, expert, row)
        return RowRead([lambda: time.sleep(0.001), *read.parts], read.finish)

    monkeypatch.setattr(HostStore, "begin", begin)


def in_ram(layers=2, **options):
    return offloaded(layers=layers, device_map="cpu", **options)


def test_ctrl_c_at_any_time_and_then_the_same_tokens(slow):
    want = say(resident(layers=2))
    model = in_ram()
    assert torch.equal(say(model), want)  # graphs are compiled: an interrupt meets our code, not the compiler's
    layers = model.moe_offload._runtime.layers
    randomly, interrupted = random.Random(0), 0
    for _ in range(30):
        timer = threading.Timer(randomly.uniform(0.001, 0.06), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            say(model)
            timer.join()
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            timer.cancel()
            timer.join()
        for layer in layers:
            slots = [slot for slot in layer.cache.slot_of if slot >= 0]
            assert len(slots) == len(set(slots))
    assert interrupted > 5
    assert torch.equal(say(model), want)
    for layer in layers:
        cache = layer.cache
        assert not cache.pending and len(cache.free) + len(cache.resident()) == cache.slots


@pytest.mark.parametrize("lasting", [False, True])
def test_a_read_that_fails_at_the_nth_time(lasting, monkeypatch):
    """Once or for ever, at every N: a typed error, and afterwards the same tokens."""
    want = say(resident(layers=2), n=4)
    model = in_ram()
    say(model, n=4)
    real, reads = HostStore.begin, [0]
    fails_at = [0]

    def begin(self, layer, expert, row):
        read = real(self, layer, expert, row)
        reads[0] += 1
        fails = reads[0] == fails_at[0] or (lasting and reads[0] > fails_at[0])

        def fail():
            raise ExpertReadError("on purpose")

        return RowRead([*read.parts, fail] if fails else read.parts, read.finish)

    monkeypatch.setattr(HostStore, "begin", begin)
    fails_at[0] = 10**9
    assert torch.equal(say(model, n=4), want)
    undisturbed, failed = reads[0], 0
    for n in range(1, undisturbed + 1):
        reads[0], fails_at[0] = 0, n
        try:
            assert torch.equal(say(model, n=4), want)
        except ExpertReadError as error:
            assert "on purpose" in str(error)
            failed += 1
        fails_at[0] = 10**9
        assert torch.equal(say(model, n=4), want)
    assert failed > undisturbed // 2 > 3
