"""The device's planner against `layer_cache.py`: the same slots, loads, counters and scores, to the bit."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload import Trace
from moe_offload.cache import DecayedLFU
from moe_offload.cache.counters import LayerCounters
from moe_offload.cache.layer_cache import LayerCache
from moe_offload.runtime.kernels import reference
from moe_offload.runtime.kernels.state import MISSES, REFUSED, Loads, make_pace
from moe_offload.runtime.kernels.state_block import StateBlock
from tests.paths import TRACES

HALF_LIFE = 32.0


class Both:
    """One layer's cache twice: `LayerCache` on the host, and the planner with its tensors."""

    def __init__(self, num_experts, slots, half_life=HALF_LIFE, kernels=reference, device="cpu"):
        self.cache = LayerCache(num_experts, slots, DecayedLFU(num_experts, half_life))
        self.state = StateBlock([(num_experts, slots)], device).states[0]
        self.kernels, self.half_life, self.device = kernels, half_life, device
        self.paces, self.loads = {}, {}

    def event(self, ids, tokens=1):
        """One event on both; returns the slots and the loads, which must be the same."""
        used = Counter(ids)
        want = self.cache.lookup(used, tokens)
        for load in want:
            self.cache.commit(load, 1)
        if tokens not in self.paces:
            self.paces[tokens] = make_pace(tokens, self.half_life, self.device)
        loads = self.loads.setdefault(len(ids), Loads.empty(len(ids), self.device))
        ids_P = torch.tensor(ids, device=self.device)
        slots = self.kernels.decide(ids_P, self.state, loads, self.paces[tokens])
        n = int(loads.count_1)
        got = list(zip(loads.expert_P.tolist(), loads.slot_P.tolist(), strict=True))
        assert got == [(load.expert, load.slot) for load in want] + [(-1, -1)] * (len(ids) - n)
        assert slots.tolist() == [self.cache.slot_of[e] for e in ids]
        return slots, got[:n]

    def check(self):
        cache, state, counters = self.cache, self.state, self.cache.counters
        assert state.slot_of_E.tolist() == cache.slot_of and state.expert_at_S.tolist() == cache.expert_at
        assert state.used_E.tolist() == cache.policy.rate.used and float(state.unit_1) == cache.policy.rate.unit
        assert state.counts_E.tolist() == counters.counts
        assert state.totals_4.tolist() == [counters.events, counters.hits, counters.misses, 0]


def test_ten_thousand_random_events():
    draw = random.Random(0)
    both = Both(24, 9)
    for i in range(10_000):
        if i % 400 == 0:  # what is hot changes now and then
            hot = draw.sample(range(24), 8)
        tokens = draw.choice([1, 1, 1, 2])
        k = draw.randint(1, 4)
        rows = [draw.sample(hot if draw.random() < 0.8 else range(24), k) for _ in range(tokens)]
        both.event([e for row in rows for e in row], tokens)
    both.check()
    assert 1000 < both.cache.counters.misses < both.cache.counters.hits  # both branches were well used


events = st.lists(
    st.integers(1, 3).flatmap(
        lambda tokens: st.lists(
            st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True), min_size=tokens, max_size=tokens
        )
    ),
    max_size=12,
)


@settings(max_examples=100)
@given(events=events, slots=st.integers(6, 7), half_life=st.floats(0.1, 1e4))
def test_any_events(events, slots, half_life):
    both = Both(7, slots, half_life)
    for rows in events:
        both.event([e for row in rows for e in row], len(rows))
    both.check()


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not here")
@pytest.mark.parametrize(
    "name", ["gpt-oss-20b_decode_dev", "deepseek-v2-lite_esft_law", "qwen3-30b-a3b_k6_bigmoeonedge"]
)
@pytest.mark.parametrize("residency", [0.25, 0.5])
def test_recorded_traces(name, residency):
    trace = Trace.load(TRACES / f"{name}.npz")
    for layer in (0, trace.experts_TLK.shape[1] // 2):
        both = Both(trace.num_experts[layer], int(trace.num_experts[layer] * residency))
        for row in trace.experts_TLK[:1500, layer].tolist():
            ids = [e for e in row if e >= 0]
            if ids:
                both.event(ids)
        both.check()


def test_scores_are_renormalised_as_on_the_host():
    both = Both(6, 3, half_life=0.25)  # the unit grows by 2 ** 4 a token: it is full after 50
    for i in range(200):
        both.event([i % 5, (i * i) % 5] if i % 5 != (i * i) % 5 else [i % 5])
    both.check()
    assert both.cache.policy.rate.unit < 2.0**200


def test_what_the_host_decided_is_taken_over_and_given_back():
    both = Both(8, 4)
    both.event([1, 2])
    prompt = Counter({0: 5, 3: 4, 4: 1, 5: 1, 6: 2})
    both.cache.counters = LayerCounters(counts=[0] * 8)  # as if the device alone had seen the event
    for _ in range(2):  # interrupted, it is done again
        both.state.pull(both.cache, top_k=2, row_bytes=10)  # a prompt is the host's
    counters = both.cache.counters
    assert (counters.events, counters.by_device, counters.misses, counters.bytes_read) == (1, 1, 2, 20)
    for load in both.cache.fill(prompt, 5)[0]:
        both.cache.commit(load, 1)
    both.state.push(both.cache)
    counters.events = counters.by_device  # of those the device tells, and the host has had a prompt as well
    for ids in ([0, 3], [7, 1], [4, 0], [2, 5]):
        both.event(ids)
    both.check()


def test_an_id_out_of_range_is_masked_and_reported():
    """On a GPU such an index would abort the context; on a CPU a negative one would wrap to another expert."""
    state, loads = StateBlock([(4, 2)], "cpu").states[0], Loads.empty(2, "cpu")
    for bad in (-1, 4, 2**31):
        slots = reference.decide(torch.tensor([bad, 3]), state, loads, make_pace(1, HALF_LIFE, "cpu"))
        assert slots[1] == state.slot_of_E[3] and 0 <= slots[0] < 2
    assert state.counts_E.tolist() == [0, 0, 0, 3] and state.totals_4[REFUSED] == 3 and state.totals_4[MISSES] == 1


@pytest.mark.parametrize("slots", [2, 5])
def test_gathered_rows_are_those_of_their_experts(slots):
    draw = random.Random(1)
    rows_EN = torch.arange(6.0).repeat_interleave(3).view(6, 3)
    bank_SN = torch.full((slots, 3), torch.nan)
    both = Both(6, slots)
    for _ in range(60):
        ids = draw.sample(range(6), 2)
        got, _ = both.event(ids)
        reference.gather(rows_EN, bank_SN, both.loads[2])
        assert bank_SN[got].tolist() == [[float(e)] * 3 for e in ids]


SYNCHRONISES = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}


def test_nothing_waits_for_the_device():
    """Any of these ops would stop the host until the GPU has caught up, and could not be captured."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    state, loads, ids = StateBlock([(8, 4)], "cpu").states[0], Loads.empty(2, "cpu"), torch.tensor([3, 5])
    rows_EN, bank_SN, step = torch.zeros(8, 6), torch.zeros(4, 6), make_pace(1, HALF_LIFE, "cpu")
    with Listen():
        slots = reference.decide(ids, state, loads, step)
        reference.gather(rows_EN, bank_SN, loads)
        reference.indexed_mm(torch.zeros(2, 3), bank_SN.view(4, 2, 3), slots)
    assert len(seen) > 20 and not seen & SYNCHRONISES
