"""The compiled replay equals the plain one, which is the runtime's cache; MIN is the roof, by exhaustive search."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.apps.simulate import fast, plain
from moe_offload.apps.simulate.stream import per_layer, pool_layers
from moe_offload.cache import POLICIES
from moe_offload.cache.belady import belady_hits
from moe_offload.cache.layer_cache import LayerCache
from moe_offload.observe.trace import Trace

E, K = 7, 3


@st.composite
def traces(draw, layers=2, most=40, forwards=True):
    tokens = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.argsort(rng.random((tokens, layers, E)) * rng.random((layers, E)), axis=2)[:, :, :K]
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.2]))] = -1
    ids[0, :, 0] = np.where(ids[0].max(axis=1) < 0, 0, ids[0, :, 0])
    starts = [0, *(t for t in range(1, tokens) if not forwards or rng.random() < 0.7)]
    requests = [0, *(t for t in starts[1:] if rng.random() < 0.2)]
    return Trace.of(ids, requests, event_start=starts, num_experts=[E] * layers)


def streams(trace):
    return [*per_layer(trace), pool_layers(trace)]


def made(name, stream, half_life=32.0):
    return POLICIES[name](stream.num_experts, half_life)


def same(found, wanted):
    assert found[0].tolist() == wanted[0].tolist() and found[1].tolist() == wanted[1].tolist()


def test_every_policy_is_compiled():
    assert {*fast.KINDS} == {*POLICIES}


@pytest.mark.parametrize("name", fast.KINDS)
@settings(max_examples=60)
@given(trace=traces(), slots=st.integers(K, E + 1), half_life=st.floats(0.1, 1e4))
def test_the_compiled_replay_is_the_plain_one(name, trace, slots, half_life):
    for stream in streams(trace):
        slots = min(slots, stream.num_experts)
        found = fast.replay_fast(stream, slots, name, half_life)
        same(found, plain.replay_policy(stream, slots, made(name, stream, half_life)))


def busy(tokens=700, experts=48, k=6):
    """Topics that come and go, for long enough that counts are halved."""
    rng = np.random.default_rng(1)
    likely = np.repeat(rng.random((tokens // 50, experts)) ** 4, 50, axis=0)
    return Trace.of(np.argsort(-likely * rng.random((tokens, experts)), axis=1)[:, None, :k], num_experts=[experts])


@pytest.mark.parametrize("name", fast.KINDS)
def test_the_compiled_replay_is_the_plain_one_on_a_long_trace(name):
    (stream,) = per_layer(busy())
    for slots in (12, 24):
        same(fast.replay_fast(stream, slots, name, 32.0), plain.replay_policy(stream, slots, made(name, stream)))


# The roof.


def most_hits(events, slots, bypass):
    """Every way to keep at most `slots` experts after each event, tried."""
    best = {frozenset(): 0}
    for event in events:
        after: dict[frozenset[int], int] = {}
        for content, hits in best.items():
            pool, gained = content | event, hits + len(content & event)
            for kept in combinations(sorted(pool), min(slots, len(pool))):
                if bypass or event <= set(kept):
                    key = frozenset(kept)
                    after[key] = max(after.get(key, 0), gained)
        best = after
    return max(best.values())


small = traces(layers=1, most=9, forwards=False)


@settings(max_examples=150)
@given(trace=small, slots=st.integers(K, 5))
def test_min_is_the_best_there_is(trace, slots):
    (stream,) = per_layer(trace)
    events = [frozenset(event.used) for event in stream.events()]
    assert plain.replay_min(stream, slots, bypass=False)[1].sum() == most_hits(events, slots, bypass=False)
    assert plain.replay_min(stream, slots, bypass=True)[1].sum() == most_hits(events, slots, bypass=True)


@settings(max_examples=60)
@given(trace=traces(layers=1), slots=st.integers(K, E))
def test_no_policy_beats_min(trace, slots):
    """Prompts that pass the slots by are among the events."""
    (stream,) = per_layer(trace)
    roof = plain.replay_min(stream, slots, bypass=False)[1].sum()
    for name in POLICIES:
        assert plain.replay_policy(stream, slots, made(name, stream))[1].sum() <= roof
    assert plain.replay_min(stream, slots, bypass=True)[1].sum() >= roof


def test_belady_by_hand():
    events = [{0: 1, 1: 1}, {2: 1, 0: 1}, {1: 1, 0: 1}, {2: 1, 1: 1}]
    assert belady_hits(events, slots=2) == [0, 1, 1, 1]  # 0 stays where 1 must go, as it is needed sooner
    assert belady_hits(events, slots=2, bypass=True) == [0, 1, 2, 1]  # 2 is used without being kept
    prompt = [{0: 1, 1: 1, 2: 1, 3: 1}, {3: 1}, {2: 1}, {0: 1}]
    assert belady_hits(prompt, slots=2) == [0, 1, 1, 0]  # a prompt leaves what is needed soonest
    many = [{e % 5: 1} for e in range(400)]
    assert sum(belady_hits(many, slots=5)) == 395, "the heap is rebuilt now and then"


def test_a_prompt_leaves_what_it_used_most():
    """One forward of more pairs than slots; then a step, and a prompt that shows nothing of what the step used."""
    rows = [[[0, 1]], [[2, 1]], [[2, 1]], [[4, 3]], [[0, 1]], [[2, 1]], [[0, 1]]]
    trace = Trace.of(rows, event_start=[0, 3, 4], num_experts=[5])
    (stream,) = per_layer(trace)
    cache = LayerCache(5, 2, POLICIES["decayed_lfu"](5, 32.0))
    events = list(stream.events())
    assert plain.replay_events(events[:1], cache, row_bytes=10).tolist() == [0] and sorted(cache.resident()) == [1, 2]
    assert plain.replay_events(events[1:2], cache, row_bytes=10).tolist() == [0] and sorted(cache.resident()) == [3, 4]
    assert plain.replay_events(events[2:], cache, row_bytes=10).tolist() == [0] and sorted(cache.resident()) == [0, 1]
    assert (cache.counters.misses, cache.counters.bytes_read, cache.counters.tokens) == (8, 80, 7)
