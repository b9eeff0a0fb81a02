"""Look-ahead where the device decides: the same slots, rows and tokens with right guesses, wrong ones and none; what is
counted; when it is switched off; and two streams that never use the same memory unordered.

Shapes: P token-expert pairs, E experts, N elements of one row.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from moe_offload import OffloadError
from moe_offload.experts import find_experts
from moe_offload.memory.transfer.fork import CudaFork, InLine
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs
from moe_offload.runtime.ahead import guard
from moe_offload.runtime.ahead.guard import LEAST, REST, WINDOW, Guard
from moe_offload.runtime.ahead.on_device import DeviceGuesses
from moe_offload.runtime.kernels import KERNELS, reference
from moe_offload.runtime.kernels.staging import STAGERS
from moe_offload.runtime.kernels.staging import reference as staged
from moe_offload.runtime.kernels.state import GUESSED
from tests.fakes.fault_store import LAYERS, LAYOUT, E, K, expected, make, prefill, tags
from tests.fakes.offloaded import IDS, SETTINGS, build, offload, resident, say
from tests.fakes.racing_cuda import Machine, Race
from tests.runtime.test_device_cache import assert_slots_hold_their_experts, fresh_dynamo  # noqa: F401

AHEAD = replace(SETTINGS, decide="device", lookahead=True, wave_rows=4)
CPU = STAGERS["cpu"]()


def rows_of(layer):
    return torch.stack([torch.full((LAYOUT.row_bytes // 4,), 100.0 * layer + e) for e in range(E)])


def rig(slots=4, scratch_rows=3, guesses=True, stagers=CPU, kernels=None, fork=None):
    """Two layers whose rows say which expert they are, decided by the device."""
    runtime, _ = make(slots, scratch_rows=scratch_rows)
    guess = partial(DeviceGuesses, stagers=stagers, fork=fork or InLine()) if guesses else None
    runtime.decide_on_device({i: rows_of(i) for i in range(LAYERS)}, 32.0, kernels or KERNELS["cpu"](), guess)
    runtime.layers[0].take_over([K])
    return runtime


def step(runtime, first_ids, guess, second_ids):
    """One forward: its rows are right; returns the slots."""
    first, second = runtime.layers
    first.take_over([K])
    slots_P = second.place_ahead(torch.tensor(guess), first.place(torch.tensor(first_ids)))
    assert torch.equal(tags(None, slots_P, first.slots.bank_SN, ()), expected(0, first_ids))
    slots_Q = second.place(torch.tensor(second_ids))
    assert torch.equal(tags(None, slots_Q, second.slots.bank_SN, ()), expected(1, second_ids))
    runtime.end_step()
    return slots_P.tolist(), slots_Q.tolist()


def counted(runtime):
    runtime.hand_back()
    return runtime.layers[1].counters


def states_of(runtime):
    runtime.hand_back()
    caches = [layer.cache for layer in runtime.layers]
    about = [(cache.expert_at, cache.policy.rate.used, cache.policy.rate.unit) for cache in caches]
    return about, [(c.counters.hits, c.counters.misses, c.counters.bytes_read, c.counters.counts) for c in caches]


@pytest.fixture
def always_on(monkeypatch):
    """Whatever is measured."""
    monkeypatch.setattr(Guard, "on", True)


@pytest.mark.parametrize("guesses", ["right", "wrong", "any", "part"])
def test_two_hundred_steps_with_any_guesses_are_those_without(guesses, always_on):
    draw, found = random.Random(0), []
    alone, guessing = rig(guesses=False), rig(stagers=stops_anywhere(draw) if guesses == "part" else CPU)
    for _ in range(200):
        ids, following = draw.sample(range(E), K), draw.sample(range(E), K)
        others = [e for e in range(E) if e not in following]
        guess = {"right": following, "wrong": others, "any": draw.sample(range(-1, E + 1), 4), "part": following}
        found = [step(runtime, ids, guess[guesses], following) for runtime in (alone, guessing)]
        assert found[0] == found[1]
    rows = int(guessing.device_caches._block.guesses_L4[1, GUESSED])
    counters = counted(guessing)
    assert states_of(alone) == states_of(guessing) and rows > 50
    for layer in guessing.layers:
        assert_slots_hold_their_experts(layer.device_cache)
    used, late, wasted = counters.ahead, counters.late, counters.wasted_bytes
    assert wasted % LAYOUT.row_bytes == 0
    if guesses in ("right", "part"):
        assert used == rows == counters.misses and wasted == 0 and (late > 20) == (guesses == "part")
    else:
        assert used + wasted // LAYOUT.row_bytes == rows and late == 0 and (used == 0) == (guesses == "wrong")


def stops_anywhere(draw):
    """Stagers whose copies come only part of the way, as when they are stopped."""

    def stage(rows_EN, scratch_GN, staging):
        scratch_GN.fill_(torch.nan)
        staged.stage(rows_EN, scratch_GN, staging)
        reached = torch.tensor([draw.randrange(2) for _ in staging.reached_R], dtype=torch.int32)
        for g, there in enumerate(reached[: len(scratch_GN)].tolist()):  # one chunk is one row here
            if not there:
                scratch_GN[g].fill_(torch.nan)
        staging.reached_R.mul_(reached)

    return CPU._replace(stage=stage)


def test_more_guesses_than_scratch_rows_are_the_first_ones(always_on):
    runtime = rig(scratch_rows=2)
    step(runtime, [0, 1], [7, 6, 5, 4], [6, 5])
    counters = counted(runtime)
    assert (counters.ahead, counters.misses, counters.wasted_bytes) == (1, 2, LAYOUT.row_bytes)


def test_a_wrong_row_in_scratch_would_be_seen(always_on):
    """The mutation that this file must notice: what is staged is another expert's row."""
    wrong = CPU._replace(stage=lambda rows_EN, *rest: staged.stage(rows_EN.roll(1, 0), *rest))
    with pytest.raises(AssertionError):
        step(rig(stagers=wrong), [0, 1], [4, 5], [4, 5])


@pytest.mark.parametrize("at", ["choose", "stage", "gather_staged"])
@pytest.mark.parametrize("done", [False, True])
def test_a_step_that_is_interrupted_in_a_guess_leaves_nothing_behind(at, done, always_on):
    runtime = rig()
    guesses = runtime.device_caches.guesses
    step(runtime, [0, 1], [2, 3], [4, 5])

    def interrupted(*arguments):
        if done:
            getattr(CPU, at)(*arguments)
        raise KeyboardInterrupt

    guesses._stagers = CPU._replace(**{at: interrupted})
    with pytest.raises(KeyboardInterrupt):
        step(runtime, [6, 7], [0, 1], [2, 0])
    guesses._stagers = CPU
    for layer in runtime.layers:
        assert_slots_hold_their_experts(layer.device_cache)
    step(runtime, [1, 2], [3, 4], [4, 3])
    assert not guesses._forked


def test_what_is_under_way_for_one_layer_is_not_taken_for_another_s(always_on):
    """A guess whose layer was never reached."""
    runtime = rig()
    first, second = runtime.layers
    second.place_ahead(torch.arange(E), torch.zeros(K, dtype=torch.int64))
    slots_P = first.place(torch.tensor([5, 2]))
    assert torch.equal(tags(None, slots_P, first.slots.bank_SN, ()), expected(0, [5, 2]))
    assert runtime.device_caches.guesses._open is second.arrivals
    first.take_over([K])
    assert runtime.device_caches.guesses._open is None and int(runtime.device_caches.guesses.staging.stop_1) == 1
    step(runtime, [1, 6], [7, 3], [3, 2])


def test_a_prompt_in_between_has_the_scratch_rows_to_itself(always_on):
    """The host takes over with a guess under way, and streams through the same memory."""
    draw, runtime = random.Random(1), rig(scratch_rows=2)
    for _ in range(20):
        step(runtime, draw.sample(range(E), K), draw.sample(range(E), 3), draw.sample(range(E), K))
        runtime.layers[1].place_ahead(torch.tensor(draw.sample(range(E), 3)), torch.zeros(K, dtype=torch.int64))
        for index, layer in enumerate(runtime.layers):
            ids = [draw.randrange(E) for _ in range(20)]
            assert torch.equal(prefill(layer, ids), expected(index, ids))
        assert not runtime.device_caches.guesses._forked
    counters = counted(runtime)
    assert counters.ahead > 20 and counters.tokens > 20 * 10


def test_a_copy_is_told_to_stop_before_it_is_waited_for(always_on):
    """The link is needed for what was asked for; and the next guess may begin."""
    seen = []

    class Noting(InLine):
        def begin(self):
            seen.append(int(guesses.staging.stop_1))
            return super().begin()

        def join(self):
            seen.append(int(guesses.staging.stop_1))
            return True

    runtime = rig(fork=Noting())
    guesses = runtime.device_caches.guesses
    for _ in range(2):
        step(runtime, [0, 1], [2, 3], [4, 5])
    assert seen == [0, 1, 0, 1]


def test_nothing_is_staged_for_layers_that_miss_nothing(always_on):
    runtime = rig(slots=E)
    step(runtime, [0, 1], [7, 6], [7, 6])
    assert counted(runtime).wasted_bytes == counted(runtime).misses == 0
    assert int(runtime.device_caches._block.guesses_L4.sum()) == 0


# Whether it is worth it.


def steps(one, count, guessed_each, used_each, start=(0, 0)):
    guessed, used = start
    for i in range(count):
        guessed, used = guessed + guessed_each, used + used_each
        one.step(float(i), guessed, used)
    return guessed, used


@pytest.fixture
def patient(monkeypatch):
    """Time says nothing."""
    monkeypatch.setattr(guard.Trial, "step", lambda self, now_s: None)


def test_too_few_right_guesses_switch_it_off_for_a_while(patient):
    one = Guard()
    total = steps(one, WINDOW // 4, 4, 2)
    assert one.on, "half of them are enough"
    total = steps(one, WINDOW // 4, 4, 1, total)
    assert not one.on and LEAST == 0.5
    total = steps(one, REST - 1, 0, 0, total)
    assert not one.on
    total = steps(one, 1, 0, 0, total)
    assert one.on, "the text may have changed"
    steps(one, WINDOW // 4, 4, 3, total)
    assert one.on


@pytest.mark.parametrize(("with_s", "verdict"), [(2.0, False), (0.5, True)])
def test_time_decides_too(with_s, verdict):
    one, now = Guard(), 0.0
    for i in range(65):
        one.step(now, 4 * i, 4 * i)
        now += with_s if one.on else 1.0
    assert one.trial.paid is verdict is one.on


def test_what_the_host_has_read_ahead_is_no_right_guess(patient):
    """It counts in the same place, and is taken over with it."""
    one = Guard()
    steps(one, WINDOW // 4 - 1, 4, 0)
    one.skip(WINDOW - 4, 10**6)
    steps(one, WINDOW // 4, 4, 0, (WINDOW - 4, 10**6))
    assert not one.on


def test_a_model_whose_guesses_are_wrong_stops_guessing_and_tries_again(patient, monkeypatch):
    """By a number that the kernel reads: what was recorded stays as it is."""
    monkeypatch.setattr(guard, "WINDOW", 12)
    monkeypatch.setattr(guard, "REST", 30)
    runtime, draw, on = rig(), random.Random(0), []
    address = runtime.device_caches.guesses.staging.on_1.data_ptr()
    for _ in range(100):
        following = draw.sample(range(E), K)
        step(runtime, [0, 1], [e for e in range(E) if e not in following][:2], following)
        on.append(int(runtime.device_caches.guesses.staging.on_1))
    switched = [i for i, (a, b) in enumerate(pairwise(on)) if a != b]
    assert [on[i] for i in switched][:3] == [1, 0, 1] and switched[1] - switched[0] == 30
    assert runtime.device_caches.guesses.staging.on_1.data_ptr() == address
    assert 12 <= counted(runtime).wasted_bytes // LAYOUT.row_bytes < 60


def test_what_was_used_is_seen_a_step_late_and_never_waited_for(patient):
    runtime = rig()
    guesses, guesses_L4 = runtime.device_caches.guesses, runtime.device_caches._block.guesses_L4
    guesses_L4[1, GUESSED] += WINDOW
    guesses.look(guesses_L4)
    assert guesses.guard.on, "the copy has only begun"
    guesses.look(guesses_L4)
    assert not guesses.guard.on and int(guesses.staging.on_1) == 0


def test_a_prompt_is_no_part_of_what_is_measured(monkeypatch):
    """What the host has read ahead in it was not guessed here, and its time is no step's."""
    runtime, skipped = rig(), []
    monkeypatch.setattr(guard.Trial, "skip", lambda self: skipped.append(1))
    step(runtime, [0, 1], [4, 5], [4, 5])
    runtime.hand_back()
    runtime.layers[1].cache.counters.ahead += 1000
    runtime.layers[0].take_over([K])
    one = runtime.device_caches.guesses.guard
    assert (one._guessed, one._used, skipped) == (2, 1002, [1])
    step(runtime, [0, 1], [6, 7], [6, 7])
    assert counted(runtime).ahead == 1004


# Two streams.


def watched(machine):
    """Kernels and stagers that say what memory they use."""

    def choose(ids_P, slots_Q, state, staging):
        machine.launch("choose", [ids_P, slots_Q, state.slot_of_E, staging.on_1], [staging.expert_G, staging.count_1])
        return staged.choose(ids_P, slots_Q, state, staging)

    def stage(rows_EN, scratch_GN, staging):
        reads = [rows_EN, staging.expert_G, staging.count_1]
        machine.launch("stage", reads, [scratch_GN, staging.reached_R])
        staged.stage(rows_EN, scratch_GN, staging)

    def gather_staged(rows_EN, scratch_GN, bank_SN, loads, state, staging):
        reads = [rows_EN, scratch_GN, staging.expert_G, staging.reached_R]
        machine.launch("gather_staged", reads, [bank_SN, state.guesses_4])
        staged.gather_staged(rows_EN, scratch_GN, bank_SN, loads, state, staging)

    def decide(ids_P, state, loads, pace_2):
        machine.launch("decide", [ids_P], [state.slot_of_E, state.expert_at_S, loads.expert_P])
        return reference.decide(ids_P, state, loads, pace_2)

    def gather(rows_EN, bank_SN, loads):
        machine.launch("gather", [rows_EN, loads.expert_P], [bank_SN])
        reference.gather(rows_EN, bank_SN, loads)

    return CPU._replace(choose=choose, stage=stage, gather_staged=gather_staged), KERNELS["cpu"]()._replace(
        decide=decide, gather=gather
    )


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.patch(monkeypatch)
    return machine


def drive(machine, fork, count=12):
    draw = random.Random(2)
    stagers, kernels = watched(machine)
    runtime = rig(stagers=stagers, kernels=kernels, fork=fork)
    for _ in range(count):
        step(runtime, draw.sample(range(E), K), draw.sample(range(E), 3), draw.sample(range(E), K))
    return runtime


def test_no_two_uses_of_memory_are_unordered_and_every_fork_is_joined(machine, always_on):
    drive(machine, CudaFork(torch.device("cuda:0")))
    (side,) = machine.streams
    assert {"choose", "stage", "gather_staged", "decide", "gather"} <= {use[-1] for use in machine.uses}
    assert side.seen[side] == 12 == machine.compute.seen[side], "a captured graph could end here"


class Unjoined(CudaFork):
    def join(self):
        return True


class Unforked(CudaFork):
    def begin(self):
        return torch.cuda.stream(self._stream)


@pytest.mark.parametrize(("fork", "says"), [(Unjoined, "does not wait for stage"), (Unforked, "does not wait for")])
def test_a_fork_or_a_join_that_is_left_out_would_be_seen(machine, always_on, fork, says):
    with pytest.raises(Race, match=says):
        drive(machine, fork(torch.device("cuda:0")))


def test_a_guess_that_is_given_up_is_joined_before_another_begins(machine, always_on):
    runtime = drive(machine, CudaFork(torch.device("cuda:0")), 2)
    second = runtime.layers[1]
    for _ in range(3):
        second.place_ahead(torch.arange(E), torch.zeros(K, dtype=torch.int64))
    runtime.hand_back()
    assert machine.compute.seen[machine.streams[0]] == 5


def test_what_is_captured_half_is_not_waited_for_and_not_used(machine, always_on, monkeypatch):
    """Begun in a graph whose capture has failed: nothing outside of it can wait for its events."""
    runtime = drive(machine, CudaFork(torch.device("cuda:0")), 2)
    first, second = runtime.layers
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    second.place_ahead(torch.tensor([4, 5]), torch.zeros(K, dtype=torch.int64))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    waited = machine.compute.seen[machine.streams[0]]
    second.place(torch.tensor([5, 4]))
    assert machine.compute.seen[machine.streams[0]] == waited and machine.uses[-1][-1] == "gather"
    machine.uses.clear()  # of the graph, which was never run
    second.place_ahead(torch.tensor([1, 2]), torch.zeros(K, dtype=torch.int64))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(OffloadError, match="one more decode step"):
        first.take_over([K])


def test_a_model_that_is_closed_while_something_is_traced_gives_all_back(always_on):
    """Python may find it then, and torch makes no real tensors in that mode."""
    runtime = rig()
    step(runtime, [0, 1], [2, 3], [4, 5])
    runtime.layers[1].place_ahead(torch.tensor([6, 7]), torch.zeros(K, dtype=torch.int64))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        runtime.close()
    assert runtime.closed and runtime.layers[1].cache.counters.misses == 2


# Whole models.


def whole(settings, family="qwen3_moe", layers=3, residency=0.25):
    model = build(family, num_hidden_layers=layers)
    moe_layers = find_experts(model)
    budget = budget_for(residency, layer_shapes(moe_layers), sum_costs(model, moe_layers, settings))
    return offload(model, budget=budget, config=settings, device_map="cpu")


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.long) for name in ("gpt_oss", "deepseek_v3"))]
)
def test_tokens_and_logits_of_a_model_are_those_of_the_unmodified_one(family, always_on):
    """Two requests: for the second prompt the host takes over."""
    layers = 3 + (family == "deepseek_v3")
    plain, model = resident(family, layers=layers), whole(AHEAD, family, layers)
    for ids in (IDS, IDS.flip(1)):
        said = say(model, ids, n=40)
        assert torch.equal(said, say(plain, ids, n=40))
    rows, used, *_ = model.moe_offload._runtime.device_caches._block.guesses_L4.sum(0).tolist()
    stats = model.moe_offload.stats()
    assert rows > 20 and stats.ahead == used > 5 and stats.by_device == 2 * 39 * 3
    with torch.no_grad():
        assert torch.equal(model(said).logits, plain(said).logits)
    model.moe_offload.close()


def test_where_the_host_decides_it_looks_ahead_as_ever():
    model = whole(replace(AHEAD, decide="host"))
    say(model)
    stats = model.moe_offload.stats()
    assert model.moe_offload._runtime.device_caches is None and stats.ahead + stats.wasted_bytes > 0
    model.moe_offload.close()
