"""Slots that are filled from remembered usage: while nothing runs, never in a forward's way, and to its end or none."""

from __future__ import annotations

import threading

import pytest
import torch

from moe_offload.errors import ExpertReadError
from moe_offload.observe.profile import Fingerprint, Profile
from moe_offload.runtime import prewarm
from moe_offload.runtime.prewarm import prewarm_when_idle
from tests.fakes import fault_store
from tests.fakes.fault_store import LAYOUT, FaultStore, assert_sound, decode, expected


@pytest.fixture
def make():
    made = []

    def build(slots, store=None):
        runtime, store = fault_store.make(slots, *([] if store is None else [store]))
        made.append(runtime)
        return runtime, store

    yield build
    for runtime in made:
        runtime.close()


def profile_of(runtime):
    """Expert e is used e times in the first layer: the last are wanted most."""
    experts = [layer.moe.num_experts for layer in runtime.layers]
    of = Fingerprint(
        model_type="fake",
        layers=len(experts),
        experts=experts,
        top_k=[1] * len(experts),
        hidden=1,
        inner=1,
        dtype="float32",
    )
    return Profile.of(of, 1000, [list(range(n)) if not layer else [0] * n for layer, n in enumerate(experts)])


def test_slots_are_filled_while_nothing_runs(make):
    runtime, _ = make(6)
    prewarm_when_idle(runtime, profile_of(runtime)).join(10)
    layer = runtime.layers[0]
    last = layer.moe.num_experts - 1
    assert sorted(layer.cache.resident()) == list(range(last - 5, last + 1))
    assert layer.cache.counters.prewarm_bytes == 6 * LAYOUT.row_bytes and layer.cache.counters.stall_s == 0
    assert_sound(layer)
    assert torch.equal(decode(layer, [last, 0]), expected(0, [last, 0]))


def test_a_forward_is_not_waited_for_and_not_held_up(make, monkeypatch):
    monkeypatch.setattr(prewarm, "BUSY_S", 0.001)
    runtime, _ = make(6)
    with runtime.lock:  # as a forward
        thread = prewarm_when_idle(runtime, profile_of(runtime))
        assert torch.equal(decode(runtime.layers[0], [0, 1]), expected(0, [0, 1]))
        assert thread.is_alive() and sorted(runtime.layers[0].cache.resident()) == [0, 1]
    thread.join(10)
    assert not thread.is_alive() and len(runtime.layers[0].cache.resident()) == 6
    assert {0, 1} <= set(runtime.layers[0].cache.resident()), "what was used is not evicted"


def test_it_ends_with_the_model(make):
    runtime, store = make(6)
    with runtime.lock:
        thread = prewarm_when_idle(runtime, profile_of(runtime))
        runtime.close()
    thread.join(10)
    assert not thread.is_alive() and store.log == []


def test_a_row_that_cannot_be_read_is_nobodys_error(make, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    runtime, _ = make(6, FaultStore(2, ExpertReadError("EIO")))
    prewarm_when_idle(runtime, profile_of(runtime)).join(10)
    assert not raised
    assert_sound(runtime.layers[0])
    assert torch.equal(decode(runtime.layers[0], [1, 2]), expected(0, [1, 2]))
