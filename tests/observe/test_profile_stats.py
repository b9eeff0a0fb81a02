"""Numbers about profiles, against their definitions; what is worth a slot, in order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload import ProfileError, Trace, TraceError
from moe_offload.apps.profile.tables import compare_profiles, inspect_profile, start_from, with_and_without
from moe_offload.cache import POLICIES
from moe_offload.cache.layer_cache import LayerCache
from moe_offload.observe.profile import Fingerprint, Profile
from moe_offload.observe.profile_stats import coverage, measure_distances, measure_skews, most_wanted, uses_per_token

E, K, LAYERS = 8, 2, 2
FACTS = {"model_type": "tiny", "hidden": 4, "inner": 4, "dtype": "float32"}


def profile(*counts, tokens=1000, **changes):
    facts = {**FACTS, "layers": len(counts), "experts": [len(c) for c in counts], "top_k": [K] * len(counts), **changes}
    return Profile.of(Fingerprint(**facts), tokens, [list(c) for c in counts])


layers = st.lists(st.integers(0, 200), min_size=E, max_size=E)


def test_skew_by_hand():
    even, one, half = measure_skews(profile([5] * 8, [9, 0, 0, 0, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0, 0, 0]))
    assert (even.entropy_bits, even.effective, even.used) == (3.0, 8.0, 8)
    assert (even.top10, even.top25, even.top50) == (1 / 8, 2 / 8, 4 / 8)  # a tenth of eight experts is one
    assert (one.entropy_bits, one.effective, one.used, one.top10) == (0.0, 1.0, 1, 1.0)
    assert (half.entropy_bits, half.effective, half.top10, half.top25) == (1.0, 2.0, 0.5, 1.0)
    (nothing,) = measure_skews(profile([0] * 8))
    assert uses_per_token(profile([0] * 8, tokens=0), 0) == [0.0] * 8
    assert (nothing.entropy_bits, nothing.used, nothing.top50) == (0.0, 0, 0.0)


@given(layers, st.integers(0, E))
def test_coverage_grows_to_one(counts, slots):
    assert coverage(counts, slots) <= coverage(counts, slots + 1) <= 1
    assert coverage(counts, E) == (1.0 if any(counts) else 0.0)


@given(layers, layers, st.integers(1, 9))
def test_distance_is_one_of_shares(a, b, times):
    here = measure_distances(profile(a, tokens=10**6), profile(b, tokens=10**6))[0]
    assert 0 <= here <= 1 and here == measure_distances(profile(b, tokens=10**6), profile(a, tokens=10**6))[0]
    assert measure_distances(profile(a, tokens=10**6), profile([times * c for c in a], tokens=10**6))[0] < 1e-6


def test_distance_by_hand():
    assert measure_distances(profile([4, 0, 0, 0]), profile([0, 0, 7, 0])) == [1.0]
    p, q, m = (0.5, 0.5), (1.0, 0.0), (0.75, 0.25)
    divergence = sum(x * math.log2(x / z) / 2 for side in (p, q) for x, z in zip(side, m, strict=True) if x)
    assert math.isclose(measure_distances(profile([5, 5]), profile([3, 0]))[0], math.sqrt(divergence))
    with pytest.raises(ProfileError, match="hidden"):
        measure_distances(profile([1, 2]), profile([1, 2], hidden=8))


def test_experts_that_nothing_used_are_not_shared():
    a, b = [0] * 32, [0] * 32
    a[20] = b[30] = 5
    assert compare_profiles(profile(a), profile(b))["layers"] == [
        {"layer": 0, "distance": 1.0, "hottest_quarter_shared": 0.0}
    ]


def test_most_wanted_goes_across_layers():
    of = profile([1, 9, 0, 5], [7, 0, 0, 2])
    assert most_wanted(of, [2, 3]) == [(0, 1), (1, 0), (0, 3), (1, 3)]  # never (1, 1), which nothing used
    assert most_wanted(of, [4, 0]) == [(0, 1), (0, 3), (0, 0)]


def routed(hot, tokens=200):
    """Tokens whose two experts are `hot`, and every fifth time another."""
    rows = [[[hot[t % 3], 7 if t % 5 == 0 else hot[(t + 1) % 3]]] for t in range(tokens)]
    return Trace.of(rows, num_experts=[E])


def test_a_replay_shows_what_a_profile_brings_and_that_a_wrong_one_fades():
    trace = routed([2, 5, 6])
    right, wrong = [0] * E, [0] * E
    for e in (2, 5, 6):
        right[e], wrong[e - 2] = 300, 300
    good = with_and_without(profile(right), [3], trace)
    assert good["cold"]["first forward"] == 0.0 and good["profile"]["first forward"] > 0
    assert good["profile"]["all"] > good["cold"]["all"]
    bad = with_and_without(profile(wrong), [3], trace)
    assert bad["cold"] == good["cold"] and abs(bad["profile"]["all"] - bad["cold"]["all"]) < 0.05
    found = inspect_profile(profile(right), [3], trace)
    assert found["pinned"] == 1.0 and found["replay"] == good
    with pytest.raises(TraceError, match="different models"):
        with_and_without(profile([1] * 4), [2], trace)


def test_start_from_is_what_optimize_does():
    cache = LayerCache(E, 3, POLICIES["successors"](E, 32.0))
    start_from(cache, profile([0, 1, 2, 3, 4, 5, 0, 0]), 0, [3])
    assert sorted(cache.resident()) == [3, 4, 5] and cache.counters.misses == 0
    assert cache.policy.victims([3, 4, 5], 3) == [3, 4, 5]
