"""Each policy against its definition: DecayedLFU and Successors as formulas, the others on small examples."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.cache import POLICIES, DecayedLFU, Successors, successors
from moe_offload.cache.decay import Rate, mean_decay
from tests.cache.test_policy_contract import E, after, counts, events, half_lives, once, order

# The scores of DecayedLFU.


def reference(history, half_life):
    """The definition, with nothing clever: every score is multiplied at every event."""
    scores = [0.0] * E
    for used, tokens in history:
        scores = [score * 2.0 ** (-tokens / half_life) for score in scores]
        left = sum(2.0 ** (-t / half_life) for t in range(tokens)) / tokens  # of uses spread over the tokens
        for e, uses in used.items():
            scores[e] += uses * left
    return scores


@given(history=events, half_life=half_lives)
def test_scores_are_those_of_the_definition(history, half_life):
    policy = after(DecayedLFU, history, half_life)
    for got, want in zip(map(policy.score, range(E)), reference(history, half_life), strict=True):
        assert math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9)


@given(history=events, half_life=half_lives)
def test_the_victim_has_the_smallest_score(history, half_life):
    scores = reference(history, half_life)
    victim = after(DecayedLFU, history, half_life).victims(range(E), 1)[0]
    assert scores[victim] <= min(scores) * (1 + 1e-6) + 1e-9


@given(prior=counts.filter(any), half_life=st.floats(1.0, 1e5))
def test_a_seeded_score_is_in_proportion_to_its_count(prior, half_life):
    policy = after(DecayedLFU, [], half_life, prior)
    total, got = sum(prior), [policy.score(e) for e in range(E)]
    for score, count in zip(got, prior, strict=True):
        assert math.isclose(score / sum(got), count / total, rel_tol=1e-6)


@pytest.mark.parametrize("half_life", [1e7, 32.0, 1e-3, 1e-9])
def test_scores_stay_finite_for_ten_million_tokens(half_life):
    policy = DecayedLFU(E, half_life)
    policy.seed([1000, *[0] * (E - 1)])
    for step in range(10_000):
        policy.access({step % (E - 1): 1}, 1000)
    assert all(math.isfinite(policy.score(e)) for e in range(E))
    assert all(map(math.isfinite, [*policy.rate.used, policy.rate.unit]))
    assert policy.victims(range(E), 1) == [E - 1]  # the one that was never used
    if half_life < 1:  # hardly any memory: least recently used
        assert policy.victims(range(E - 1), 1) == [10_000 % (E - 1)]


# The scores of Successors.


class PlainSuccessors:
    """The definition: every rate is multiplied at every event."""

    def __init__(self, num_experts=E):
        self.fast, self.slow = [0.0] * num_experts, [0.0] * num_experts
        self.by, self.followed, self.sets = [[0] * num_experts for _ in self.fast], [0] * num_experts, []

    def access(self, used, tokens):
        for rates, half_life in ((self.fast, successors.FAST), (self.slow, successors.SLOW)):
            for e in range(len(rates)):
                left = sum(2 ** (-t / half_life) for t in range(tokens)) / tokens  # of uses spread over the tokens
                fresh = used.get(e, 0) * left * (1 - 2 ** (-1 / half_life))
                rates[e] = rates[e] * 2 ** (-tokens / half_life) + fresh
        back = (len(self.sets) + 1) % 2 + 1  # in turns for the set before, and the set before that
        for f in self.sets[-back] if back <= len(self.sets) else []:
            self.followed[f] += 1
            for e in used:
                self.by[f][e] += 1
            if self.followed[f] == 255:
                self.followed[f], self.by[f] = 127, [count // 2 for count in self.by[f]]
        self.sets.append(used)

    def score(self, e):
        current = self.sets[-1]
        follows = sum(self.by[f][e] / (self.followed[f] + successors.DOUBT) for f in current) / len(current)
        return self.fast[e] + self.slow[e] + successors.WEIGHT * follows


@given(history=events.filter(bool), again=st.integers(1, 40))
def test_victims_have_the_smallest_scores(history, again):
    policy, plain = Successors(E), PlainSuccessors()
    for used, tokens in history * again:
        policy.access(used, tokens)
        plain.access(used, tokens)
    scores = [plain.score(e) for e in policy.victims(range(E), E)]
    assert all(a <= b + 1e-6 for a, b in pairwise(scores))


def test_rates_stay_finite_for_ten_million_tokens():
    policy = Successors(E)
    policy.seed([1.0, *[0.0] * (E - 1)])
    for step in range(20_000):
        policy.access({step % (E - 1): 1}, 1000 if step % 2 else 1)
    for rate in (policy.fast, policy.slow):
        assert all(map(math.isfinite, [*rate.used, rate.unit]))
    assert policy.victims(range(E), 1) == [E - 1]


def test_a_prompt_says_nothing_of_what_follows_what():
    """Nor does what was used before it: the event after a prompt is no successor of one that came before."""
    policy = Successors(64)
    policy.access({0: 1}, 1)
    policy.access(dict.fromkeys(range(successors.LARGEST_CONTEXT + 1), 1), 9)
    policy.access({1: 1}, 1)
    assert policy.followed == [0] * 64
    policy.access(dict.fromkeys(range(successors.LARGEST_CONTEXT), 1), 9)
    policy.access({1: 1}, 1)
    assert any(policy.followed), "an event of as many is still one that something follows"


def test_of_many_candidates_those_with_the_lowest_slow_rates_are_scored():
    draw, size, places = random.Random(0), 40, set()
    policy, plain = Successors(size), PlainSuccessors(size)
    for _ in range(600):
        event = once(draw.sample(range(size), 3))
        policy.access(event, 1)
        plain.access(event, 1)
        candidates = sorted(set(range(size)) - set(event), key=plain.slow.__getitem__)
        (victim,) = policy.victims(candidates, 1)
        assert plain.score(victim) <= min(map(plain.score, candidates[: successors.SHORTLIST])) + 1e-9
        places.add(candidates.index(victim))
    assert max(places) == successors.SHORTLIST - 1 == 13, "each of the 14 had its turn, and none beyond"


def test_of_two_candidates_the_one_that_follows_what_is_in_use_stays():
    policy = Successors(4)
    for _ in range(4):  # 1 follows 0; 2 is used as often, and later
        for e in (0, 1, 3, 3, 2, 3, 3):
            policy.access({e: 1}, 1)
    policy.access({0: 1}, 1)
    assert policy.slow.used[1] < policy.slow.used[2] and policy.victims([1, 2], 1) == [2]


def test_a_prior_is_a_rate_of_at_most_one_use_a_token():
    for prior, rates in (([0.5, 0.25], [0.5, 0.25]), ([4.0, 1.0], [1.0, 0.25])):
        policy = Successors(2)
        policy.seed(prior)
        for rate in (policy.fast, policy.slow):
            assert [used * rate.share / rate.unit for used in rate.used] == pytest.approx(rates)


# Rates of decayed uses.


def test_a_seeded_rate_is_what_an_endless_stream_would_have_left():
    """So an expert that goes on being used as often keeps its rate, whenever it was seeded."""
    for begun in (0, 50):
        rate = Rate(2, 8.0)
        rate.add({0: 1}, 1)
        for _ in range(begun):
            rate.add({1: 1}, 1)
        rate.seed([1.0, 0.5])
        for _ in range(64):
            rate.add({0: 1}, 1)
        assert [used * rate.share / rate.unit for used in rate.used] == pytest.approx([1.0, 0.5 * 2.0**-8])


@pytest.mark.parametrize(("tokens", "half_lives"), [(0, 0), (1, 1), (60, 60), (64, 64), (1000, 64)])
def test_so_many_half_lives_pass(tokens, half_lives):
    """One for each token here, at most 64 in an event; none where no token passes: the layers of one simulated cache
    share a forward's tokens, which count with the first."""
    rate = Rate(2, 1.0)
    rate.add({0: 1}, 1)
    rate.add({1: 1}, tokens)
    assert rate.used[0] / rate.unit == 2.0**-half_lives


@pytest.mark.parametrize("tokens", [1, 2, 3, 50])
def test_uses_of_a_prompt_are_spread_over_its_tokens(tokens):
    assert mean_decay(tokens, 2.0) == pytest.approx(sum(2.0 ** (-t / 2) for t in range(tokens)) / tokens)


# The others, on small examples.


def test_tiny_lfu_halves_all_counts_when_ten_uses_an_expert_have_been_seen():
    policy = POLICIES["tiny_lfu"](2, 32.0)
    for _ in range(19):
        policy.access({0: 1}, 1)
    assert policy.uses == [19, 0]
    policy.access({1: 1}, 1)
    assert policy.uses == [9.5, 0.5]
    for _ in range(9):
        policy.access({1: 1}, 1)
    assert policy.uses == [9.5, 9.5], "the half that is kept counts as seen"
    policy.access({0: 1}, 1)
    assert policy.uses == [5.25, 4.75]
    policy.access({0: 40, 1: 10}, 50)
    assert policy.uses == [45.25 / 4, 14.75 / 4], "a prompt of three times as many: twice"


@pytest.mark.parametrize("name", ["tiny_lfu", "lfu", "lru"])
def test_among_equals_the_least_recently_used_gives_way(name):
    assert order(after(POLICIES[name], [({e: 1}, 1) for e in (2, 0, 3, 1)]))[-4:] == [2, 0, 3, 1]


@pytest.mark.parametrize(("name", "most"), [("tiny_lfu", 10), ("lfu", 100)])
def test_a_prior_counts_as_so_many_uses(name, most):
    for prior, shares in (([0.5, 0.25, 0], [0.5, 0.25, 0]), ([4.0, 1.0, 0], [1.0, 0.25, 0])):
        assert after(POLICIES[name], [], prior=prior).uses == [share * most for share in shares]


@pytest.mark.parametrize("name", ["lfu", "lru", "tiny_lfu"])
def test_in_a_prompt_what_more_tokens_use_stays_longer(name):
    assert order(after(POLICIES[name], [({3: 1, 1: 2, 0: 4}, 4)]))[-3:] == [3, 1, 0]


@pytest.mark.parametrize(
    ("history", "first"),
    [
        ([({0: 4}, 4), ({1: 1}, 1), ({2: 1}, 3)], [1, 0]),  # ages 4 and 3; 0 has been used 3.9 times: its age halves
        ([({0: 4}, 4), ({1: 1}, 2), ({2: 1}, 2)], [1, 0]),  # ages 4 / 2 and 2: the same, and 0 is used more
        ([({0: 4}, 4), ({1: 1}, 100), ({2: 1}, 1)], [0, 1]),  # ages are tokens, not events: 101 / 2 and 1
        ([({0: 6}, 6), ({1: 1}, 100), ({2: 1}, 200)], [0, 1]),  # ages 300 and 200: uses below 1 do not double an age
    ],
)
def test_lrfu_classes_halve_an_age_for_each_doubling_of_the_uses(history, first):
    assert order(after(POLICIES["lrfu_classes"], history))[-3:] == [*first, 2]
