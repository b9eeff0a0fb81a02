"""What every policy promises, checked on every entry of POLICIES."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_offload.cache import POLICIES
from tests.paths import ROOT

E = 8

experts = st.sets(st.integers(0, E - 1), min_size=1, max_size=4).map(sorted)
sizes = st.just(1) | st.integers(1, 100)
event = sizes.flatmap(
    lambda tokens: st.tuples(
        st.dictionaries(st.integers(0, E - 1), st.integers(1, tokens), min_size=1, max_size=4), st.just(tokens)
    )
)
events = st.lists(event, max_size=30)
counts = st.lists(st.integers(0, 1000), min_size=E, max_size=E)
half_lives = st.floats(0.01, 1e7)


every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


def after(make, history, half_life=32.0, prior=None):
    policy = make(E, half_life)
    if prior is not None:
        policy.seed(prior)
    for used, tokens in history:
        policy.access(used, tokens)
    return policy


def once(experts):
    """An event in which one token uses each of them."""
    return dict.fromkeys(experts, 1)


def order(policy):
    """All experts in the order in which they give way."""
    return policy.victims(range(E), E)


@every_policy
@given(history=events, half_life=half_lives, candidates=experts, prior=st.none() | counts)
def test_victims_are_candidates(make, history, half_life, candidates, prior):
    policy = after(make, history, half_life, prior)
    for n in range(len(candidates) + 1):
        gone = policy.victims(iter(candidates), n)  # candidates come once, as any iterable
        assert len(gone) == len(set(gone)) == n and set(gone) <= set(candidates)


@every_policy
@given(history=events, half_life=half_lives, prior=st.none() | counts)
def test_the_same_history_gives_the_same_victims(make, history, half_life, prior):
    assert order(after(make, history, half_life, prior)) == order(after(make, history, half_life, prior))


@every_policy
@given(history=events, candidates=experts)
def test_asking_for_a_victim_changes_nothing(make, history, candidates):
    asked, not_asked = after(make, history), after(make, history)
    for _ in range(3):
        asked.victims(candidates, 1)
    assert order(asked) == order(not_asked)


class Cut:
    """KeyboardInterrupt at the `at`th line that runs, counted from 1."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@every_policy
def test_ctrl_c_in_an_access_leaves_it_working(make):
    """Counts that were raised and their sum, which was not, drifted apart, until they no longer fitted a byte."""
    policy, used, before = make(E, 32.0), once([0, 1, 2]), sys.gettrace()
    for turn in range(900):
        sys.settrace(Cut(turn % 60 + 1))
        try:
            policy.access(used, 1)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        policy.access(used, 1)
        assert sorted(order(policy)) == list(range(E))


@every_policy
@given(prior=counts)
def test_a_higher_count_in_the_profile_gives_way_later(make, prior):
    gone = [prior[e] for e in order(after(make, [], prior=prior))]
    assert gone == sorted(gone)


@every_policy
@given(prior=counts, used=experts)
def test_a_profile_of_nothing_but_zeros_is_no_prior(make, prior, used):
    assert order(after(make, [(once(used), 1)], prior=[0] * E)) == order(after(make, [(once(used), 1)]))


@every_policy
@given(prior=counts)
def test_a_profile_is_outweighed_by_use(make, prior):
    """A prior, never a pin: what is used steadily from now on ends up above everything that is not."""
    policy = after(make, [(once([0]), 1)] * 400, prior=prior)
    assert order(policy)[-1] == 0


@every_policy
@given(history=events, used=experts)
def test_what_was_just_used_outlives_what_never_was(make, history, used):
    policy = after(make, [*history, (once(used), 1)])
    never = set(range(E)) - {e for event, _ in history for e in event} - set(used)
    assume(never)
    assert policy.victims([*used, *never], 1)[0] in never


def test_policies_need_no_torch():
    program = "import sys, moe_offload.cache, moe_offload.cache.layer_cache; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
