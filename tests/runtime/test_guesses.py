"""Look-ahead: the next layer's router asked early. What it loads, what it never changes, and when it is given up."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from moe_offload import ExpertReadError
from moe_offload.runtime.ahead.guesses import BLOCK, BLOCKS, VERDICT, Trial
from moe_offload.runtime.layer import LayerRuntime
from tests.fakes.fault_store import LAYOUT, E, FaultStore, assert_sound, decode, expected, make, prefill
from tests.fakes.offloaded import SETTINGS, offload, offloaded, resident, say
from tests.fakes.offloaded import build as build_tiny

FAMILIES = [
    "qwen3_moe",
    "deepseek_v3",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("gpt_oss", "mixtral", "olmoe")),
]


def looking_ahead(**options):
    import dataclasses

    return dataclasses.replace(SETTINGS, lookahead=True, **options)


@pytest.fixture
def heard(monkeypatch):
    """What each layer was told to expect, and what it was then asked for: [(layer, ids)] each."""
    guesses, events = [], []
    prefetch, event = LayerRuntime.prefetch, LayerRuntime._event

    def heard_prefetch(self, ids_P):
        guesses.append((self.moe.index, sorted(ids_P.flatten().tolist())))
        prefetch(self, ids_P)

    def heard_event(self, ids_P):
        events.append((self.moe.index, sorted(ids_P.flatten().tolist())))
        return event(self, ids_P)

    monkeypatch.setattr(LayerRuntime, "prefetch", heard_prefetch)
    monkeypatch.setattr(LayerRuntime, "_event", heard_event)
    return guesses, events


# The pass, in whole models.


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_resident_model(family):
    want = say(resident(family, layers=3))
    model = offloaded(family, layers=3, config=looking_ahead(), budget=None, residency=0.6)
    assert torch.equal(say(model), want)
    stats = model.moe_offload.stats()
    assert stats.ahead + stats.wasted_bytes > 0, "it was never asked"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_guess_is_what_the_router_says_of_an_unchanged_residual(family, heard):
    """With attention and experts that add nothing, the residual stream never changes, and every guess must be right."""
    model = build_tiny(family, num_hidden_layers=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj")):
                p.zero_()
    model = offload(model, 0.6, config=looking_ahead())
    guesses, events = heard
    say(model)
    asked = [event for event in events if event[0] > 0]
    assert guesses and guesses == asked
    stats = model.moe_offload.stats()
    assert stats.wasted_bytes == 0 and stats.ahead > 0


def test_off_means_not_in_the_graph(heard):
    say(offloaded(layers=3))
    assert heard[0] == []


def test_the_last_layer_s_guess_is_not_made_twice_nor_missing(heard):
    say(offloaded(layers=3, config=looking_ahead()), n=4)
    per_layer = [layer for layer, _ in heard[0]]
    assert per_layer.count(1) == per_layer.count(2) > 0 and 0 not in per_layer


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.long)])
def test_under_inductor_the_guess_is_still_asked(heard, overlap):
    model = offloaded(layers=2, config=looking_ahead(compile="inductor", overlap=overlap))
    with torch.no_grad():
        model(torch.tensor([[5]]))
        model(torch.tensor([[6]]))
    assert len([1 for layer, _ in heard[0] if layer == 1]) == 2


# The runtime: two layers over a store that fails on cue.


def guess(runtime, ids):
    """Layer 0 says what layer 1 will be asked for; its own event lets the loads begin."""
    runtime.layers[1].prefetch(torch.tensor(ids))
    assert torch.equal(decode(runtime.layers[0], [0, 1]), expected(0, [0, 1]))


def settle(layer):
    """Until nothing of a guess is on its way any more."""
    for arrival in layer.arrivals.guessed.values():
        assert arrival.ticket.done.wait(120)


def test_what_was_guessed_is_there_when_asked_for():
    runtime, store = make(slots=5)
    second = runtime.layers[1]
    guess(runtime, [4, 5])
    settle(second)
    assert torch.equal(decode(second, [5, 4]), expected(1, [5, 4]))
    counters = second.cache.counters
    assert (counters.hits, counters.misses, counters.ahead, counters.late) == (0, 2, 2, 0)
    assert counters.bytes_read == 2 * LAYOUT.row_bytes and counters.wasted_bytes == 0
    assert store.log.count((1, 4)) == store.log.count((1, 5)) == 1
    assert_sound(second)


class Gated(FaultStore):
    """Rows of layer 1 are read once `gate` is open."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def read(self, layer, expert, row):
        assert layer == 0 or self.gate.wait(120)
        return super().read(layer, expert, row)


def open_when_waited_for(store, transfer, monkeypatch):
    wait = transfer.wait
    monkeypatch.setattr(transfer, "wait", lambda ticket: (store.gate.set(), wait(ticket))[1])


def test_what_was_guessed_and_is_still_being_read_is_late(monkeypatch):
    runtime, store = make(slots=5, store=Gated(), threads=3)
    second = runtime.layers[1]
    guess(runtime, [4, 5])
    open_when_waited_for(store, second.arrivals.transfer, monkeypatch)
    assert torch.equal(decode(second, [5, 4]), expected(1, [5, 4]))
    assert (second.cache.counters.ahead, second.cache.counters.late) == (2, 2)


def test_what_was_read_ahead_into_scratch_and_is_not_there_yet_is_late(monkeypatch):
    runtime, store = make(slots=2, scratch_rows=2, store=Gated(), threads=3)
    first, second = runtime.layers
    prefill(first, list(range(E)) * 2)
    open_when_waited_for(store, second.arrivals.transfer, monkeypatch)
    assert torch.equal(prefill(second, list(range(E))), expected(1, list(range(E))))
    assert (second.cache.counters.ahead, second.cache.counters.late) == (2, 2)


def test_guesses_that_are_still_being_read_count_to_the_next_ones():
    """Together they leave the room that an event of as many experts needs."""
    runtime, store = make(slots=5, store=Gated(), threads=3)
    second = runtime.layers[1]
    guess(runtime, [4, 5])
    guess(runtime, [6, 7])
    assert list(second.arrivals.guessed) == [4, 5, 6]
    store.gate.set()
    settle(second)
    assert torch.equal(decode(second, [0, 1]), expected(1, [0, 1]))
    assert_sound(second)


def test_of_wrong_guesses_those_being_read_go_on_while_there_is_room(monkeypatch):
    """To stop a read would be to wait for it; one that has not begun costs nothing."""
    runtime, store = make(slots=5, store=Gated(), threads=1)
    second = runtime.layers[1]
    guess(runtime, [4, 5])
    while not second.arrivals.guessed[4].ticket.begun:
        time.sleep(0.001)
    open_when_waited_for(store, second.arrivals.transfer, monkeypatch)
    assert torch.equal(decode(second, [0, 1, 2]), expected(1, [0, 1, 2]))
    assert list(second.arrivals.guessed) == [4]


def test_a_wrong_guess_costs_its_bytes_and_nothing_else():
    runtime, _ = make(slots=5)
    second = runtime.layers[1]
    guess(runtime, [4, 5])
    settle(second)
    assert torch.equal(decode(second, [6, 7]), expected(1, [6, 7]))
    counters = second.cache.counters
    assert (counters.misses, counters.ahead, counters.wasted_bytes) == (2, 0, 2 * LAYOUT.row_bytes)
    assert sorted(second.cache.resident()) == [4, 5, 6, 7]  # it is there all the same
    assert torch.equal(decode(second, [4, 5]), expected(1, [4, 5])) and counters.hits == 2
    assert_sound(second)


def test_a_guess_leaves_room_for_what_will_be_asked():
    """Whatever is guessed, the event that follows finds its slots, even if it asks for something else entirely."""
    runtime, _ = make(slots=4)
    second = runtime.layers[1]
    for wanted in ([0, 1, 2, 3], [4, 5, 6, 7], [3, 4, 0, 7]):
        guess(runtime, [(e + 4) % E for e in wanted[:3]])
        assert torch.equal(decode(second, wanted), expected(1, wanted))
        assert_sound(second)


def test_nothing_is_guessed_where_every_slot_is_needed():
    runtime, store = make(slots=2)
    guess(runtime, [4, 5])
    assert not runtime.layers[1].arrivals.guessed and all(layer == 0 for layer, _ in store.log)


@pytest.mark.parametrize("wanted", [[4, 5], [6, 7]])
def test_a_guess_that_cannot_be_read_harms_nobody(wanted):
    runtime, store = make(slots=5)
    second = runtime.layers[1]
    decode(runtime.layers[0], [0, 1])
    store.at, store.fault, store.lasting = len(store.log) + 1, ExpertReadError("on purpose"), True
    guess(runtime, [4, 5])
    settle(second)
    store.fault = None
    assert torch.equal(decode(second, wanted), expected(1, wanted))
    assert second.cache.counters.wasted_bytes == 2 * LAYOUT.row_bytes
    assert_sound(second)


def test_a_guess_interrupted_by_a_prompt():
    runtime, _ = make(slots=5, scratch_rows=2)
    second = runtime.layers[1]
    guess(runtime, [4, 5])
    assert torch.equal(prefill(second, list(range(E)) * 2), expected(1, list(range(E)) * 2))
    settle(second)
    assert torch.equal(decode(second, [1, 2]), expected(1, [1, 2]))
    assert_sound(second)


def test_every_slot_tells_its_expert_whatever_is_guessed():
    generator = torch.Generator().manual_seed(0)
    runtime, _ = make(slots=5, scratch_rows=2, threads=3)
    for _ in range(300):
        ids = torch.randperm(E, generator=generator)
        guess(runtime, ids[:3].tolist())
        wanted = ids[1:4].tolist()
        assert torch.equal(decode(runtime.layers[1], wanted), expected(1, wanted))
        assert len(runtime.layers[1].arrivals.guessed) <= 5
    settle(runtime.layers[1])
    decode(runtime.layers[1], [0])
    assert_sound(runtime.layers[1])


def test_ids_no_layer_has_are_no_guess():
    runtime, _ = make(slots=5)
    guess(runtime, [E, -1, 4])
    settle(runtime.layers[1])
    assert torch.equal(decode(runtime.layers[1], [4]), expected(1, [4]))


# Whether it pays.


def run(trial, with_s, without_s, steps, start=0.0):
    now = start
    for _ in range(steps):
        trial.step(now)
        now += with_s if trial.on else without_s
    return now


@pytest.mark.parametrize(("with_s", "without_s", "verdict"), [(1.0, 1.2, True), (1.2, 1.0, False), (1.0, 1.0, False)])
def test_the_faster_setting_wins(with_s, without_s, verdict):
    trial = Trial()
    now = run(trial, with_s, without_s, BLOCK * BLOCKS)
    assert trial.paid is verdict and trial.on is verdict
    run(trial, with_s, without_s, VERDICT - 1, now)
    assert trial.on is verdict


def test_it_is_tried_again_when_times_change():
    trial = Trial()
    now = run(trial, 1.0, 1.2, BLOCK * BLOCKS + VERDICT)
    run(trial, 1.2, 1.0, BLOCK * BLOCKS, now)
    assert trial.paid is False


def test_a_pause_is_no_step():
    trial = Trial()
    now = 0.0
    for step in itertools.count():
        if trial.paid is not None:
            break
        if step % 3 == 0:
            trial.skip()
            now += 1000.0
        trial.step(now)
        now += 1.0 if trial.on else 1.2
    assert trial.paid is True


def test_noise_in_the_first_step_of_a_block_does_not_count():
    trial, now, was = Trial(), 0.0, None
    for _ in range(BLOCK * BLOCKS):
        trial.step(now)
        now += (50.0 if trial.on and was is not True else 1.0) if trial.on else 1.1
        was = trial.on
    assert trial.paid is True
