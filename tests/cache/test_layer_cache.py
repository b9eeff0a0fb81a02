"""LayerCache as a state machine: eight experts at most, up to five slots, loads that arrive, fail or hang."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_offload.cache import POLICIES, DecayedLFU
from moe_offload.cache.layer_cache import LayerCache, Load
from moe_offload.errors import RoutingError

ROW = 10  # bytes
#: A load that hangs is taken back when the event is given up, as one that fails is.
OUTCOMES = st.sampled_from(["commit", "commit", "commit", "abort", "hang"])


def make(num_experts=6, slots=3, policy="decayed_lfu"):
    return LayerCache(num_experts, slots, POLICIES[policy](num_experts, 4.0))


def once(experts):
    """An event in which one token uses each of them."""
    return dict.fromkeys(experts, 1)


def check(cache):
    """The whole structure, from nothing but its public fields."""
    used = [s for s in range(cache.slots) if cache.expert_at[s] >= 0]
    pending = [load.slot for load in cache.pending.values()]
    everywhere = [*used, *pending, *cache.free]
    assert sorted(everywhere) == list(range(cache.slots)), "each slot is used, pending or free, and only one of these"
    for slot in used:
        assert cache.slot_of[cache.expert_at[slot]] == slot
    for expert, slot in enumerate(cache.slot_of):
        assert slot == -1 or cache.expert_at[slot] == expert
    for expert, load in cache.pending.items():
        assert load.expert == expert and cache.slot_of[expert] == -1, "nothing points to a row that has not arrived"
    assert sorted(cache.resident()) == sorted(e for e in range(cache.num_experts) if cache.slot_of[e] >= 0)


class CacheMachine(RuleBasedStateMachine):
    """The model it is compared with: which expert's bytes each slot holds, written only when a load is committed."""

    @initialize(
        experts=st.integers(1, 8), slots=st.integers(1, 5), policy=st.sampled_from(sorted(POLICIES)), data=st.data()
    )
    def start(self, experts, slots, policy, data):
        self.cache = make(experts, min(slots, experts), policy)
        self.bytes = {}  # slot -> expert
        self.hits = self.misses = self.read = self.prewarmed = self.events = 0

    def draw_experts(self, data, most):
        return data.draw(st.lists(st.integers(0, self.cache.num_experts - 1), unique=True, max_size=most), "experts")

    def settle(self, loads, data, event=(), demanded=True):
        """Let each load arrive or fail. As in the runtime, a failure takes back whatever has not arrived by then."""
        for load in loads:
            self.bytes[load.slot] = None  # from now on the slot holds neither the old row nor the new one
        for load in loads:
            before = self.counted()
            if data.draw(OUTCOMES, "outcome") != "commit":
                for late in list(self.cache.pending.values()):
                    self.cache.abort(late)
                    self.cache.abort(late)  # a second time does nothing
                assert self.counted() == before
                return
            self.cache.commit(load, ROW, demanded)
            self.bytes[load.slot] = load.expert
            self.misses += demanded
            self.read += ROW * demanded
            self.prewarmed += ROW * (not demanded)
        assert all(self.cache.slot_of[e] >= 0 for e in event), "all experts of an event are resident together"

    def counted(self):
        c = self.cache.counters
        return c.hits, c.misses, c.bytes_read, c.prewarm_bytes

    @rule(data=st.data())
    def lookup(self, data):
        event = self.draw_experts(data, self.cache.slots)
        before = set(self.cache.resident())
        loads = self.cache.lookup(once(event))
        self.events += 1
        self.hits += len(before & set(event))
        assert {load.expert for load in loads} == set(event) - before
        assert not (before - set(self.cache.resident())) & set(event), "a victim was in the event"
        check(self.cache)
        self.settle(loads, data, event)

    @rule(data=st.data())
    def fill(self, data):
        used = {e: data.draw(st.integers(1, 9), "uses") for e in self.draw_experts(data, self.cache.num_experts)}
        before, pending = set(self.cache.resident()), len(self.cache.pending)
        loads, without_slot = self.cache.fill(used, 9)
        self.events += 1
        self.hits += len(before & set(used))
        gone, admitted = before - set(self.cache.resident()), {load.expert for load in loads}
        assert not gone & set(used), "a victim was in the event"
        assert sorted([*admitted, *without_slot]) == sorted(set(used) - before), "each missing row is loaded once"
        assert not (gone and self.cache.free), "evicted, with a slot to spare"
        assert not (without_slot and self.cache.free), "streamed, with a slot to spare"
        policy, kept = self.cache.policy, admitted | (before - gone - set(used))
        if isinstance(policy, DecayedLFU):
            lost = [policy.score(e) for e in [*gone, *without_slot]]
            assert not kept or not lost or min(policy.score(e) for e in kept) >= max(lost), "a colder row stayed"
        assert len(loads) <= self.cache.slots - pending
        check(self.cache)
        self.settle(loads, data)

    @rule(data=st.data())
    def prewarm(self, data):
        wanted = self.draw_experts(data, self.cache.num_experts)
        before, room = self.cache.resident(), len(self.cache.free)
        loads = self.cache.fill_free_slots(wanted)
        assert self.cache.resident() == before, "prewarm evicted"
        assert [load.expert for load in loads] == [e for e in wanted if e not in before][:room]
        self.settle(loads, data, demanded=False)

    @precondition(lambda self: hasattr(self, "cache"))
    @rule(bad=st.integers(-20, -1) | st.integers(8, 100), data=st.data())
    def ask_for_what_is_not_there(self, bad, data):
        event = [*self.draw_experts(data, self.cache.slots), bad]
        with pytest.raises(
            RoutingError, match=f"expert {bad}, but the layer has experts 0..{self.cache.num_experts - 1}"
        ):
            self.cache.check(event)

    @precondition(lambda self: hasattr(self, "cache") and self.cache.slots < self.cache.num_experts)
    @rule()
    def ask_for_too_many(self):
        with pytest.raises(ValueError, match="does not fit"):
            self.cache.lookup(once(range(self.cache.slots + 1)))

    @invariant()
    def structure(self):
        if hasattr(self, "cache"):
            check(self.cache)
            for expert in self.cache.resident():
                assert self.bytes[self.cache.slot_of[expert]] == expert, "a mapping to another row, or to half a row"

    @invariant()
    def counters(self):
        if hasattr(self, "cache"):
            assert self.counted() == (self.hits, self.misses, self.read, self.prewarmed)
            assert self.cache.counters.events == self.events


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25)
test_cache_machine = CacheMachine.TestCase


def commit_all(cache, loads):
    for load in loads:
        cache.commit(load, ROW)


def test_victims_are_never_in_the_event_though_they_score_least():
    """The bug of vllm-project/vllm#50562: an expert loaded in this very call has the lowest frequency of all."""
    cache = make(slots=3)
    for _ in range(5):
        commit_all(cache, cache.lookup(once([0, 1])))
    commit_all(cache, cache.lookup(once([2])))
    commit_all(cache, cache.lookup(once([2, 3, 4])))
    assert sorted(cache.resident()) == [2, 3, 4]


def test_a_load_under_way_is_no_victim():
    cache = make(slots=3)
    first = cache.lookup(once([0]))
    commit_all(cache, cache.lookup(once([1, 2])))
    commit_all(cache, cache.lookup(once([3, 4])))
    check(cache)
    commit_all(cache, first)
    assert sorted(cache.resident()) == [0, 3, 4]


def test_a_victim_is_unmapped_before_its_successor_arrives():
    cache = make(slots=1)
    commit_all(cache, cache.lookup(once([0])))
    (load,) = cache.lookup(once([1]))
    assert cache.slot_of[0] == -1 and cache.slot_of[1] == -1 and load == Load(1, 0)
    cache.abort(load)
    assert cache.free == [0] and not cache.resident()


def test_the_same_events_give_the_same_slots():
    events = [[0, 1], [2, 3], [0, 4], [5, 1], [2, 0], [3, 4]]

    def replay():
        cache, log = make(slots=3), []
        for event in events:
            loads = cache.lookup(once(event))
            commit_all(cache, loads)
            log.append((loads, list(cache.expert_at)))
        return log

    assert replay() == replay()


@pytest.mark.parametrize("bad", [-1, -6, 6, 10**9])
def test_ids_outside_the_layer_are_refused(bad):
    with pytest.raises(RoutingError, match=f"asked for expert {bad}"):
        make().check([0, bad, 1])
    make().check([])


def test_an_event_loads_the_same_rows_in_whichever_order_its_experts_come():
    """Gather and grouped code list the same ids in different orders."""
    found = []
    for order in ([4, 1, 2], [1, 2, 4], [2, 4, 1]):
        cache = make()
        found.append(cache.lookup(once(order)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("again", [[0, 1], [1, 2]])
def test_an_expert_already_loading_is_not_loaded_twice(again):
    """An event that meets the loads of an earlier one, which was interrupted before they could be taken back."""
    cache = make(slots=4)
    cache.lookup(once([0, 1]))
    cache.lookup(once(again))
    check(cache)
    assert cache.counters.hits == 0, "what is on its way is no hit"


def test_pre_warming_with_an_expert_named_twice_loads_it_once():
    cache = make(slots=4)
    assert [load.expert for load in cache.fill_free_slots([2, 2, 3])] == [2, 3]
    check(cache)


def test_of_a_prompt_what_is_used_most_comes_first():
    cache = make(slots=2)
    commit_all(cache, cache.lookup(once([5])))
    loads, without_slot = cache.fill({0: 1, 1: 4, 2: 2, 3: 3, 4: 2, 5: 9}, 9)
    assert ([load.expert for load in loads], without_slot) == ([1], [3, 2, 4, 0])


def test_of_equals_a_resident_expert_stays_and_then_what_a_prompt_uses_more():
    """A policy that knows nothing lets the first of its candidates go."""
    cache = make(slots=2)
    commit_all(cache, cache.lookup(once([5])))
    cache.policy = SimpleNamespace(access=lambda used, tokens: None, victims=lambda experts, n: list(experts)[:n])
    loads, without_slot = cache.fill({0: 1, 1: 4, 2: 2}, 9)
    assert ([load.expert for load in loads], without_slot, cache.resident()) == ([1], [2, 0], [5])


def test_a_guess_takes_no_slot_of_what_it_expects_or_was_told_to_keep():
    cache = make(slots=3)
    commit_all(cache, cache.lookup(once([0, 1, 2])))
    assert [load.expert for load in cache.guess([3, 0, 4], most=9, keep=[1])] == [3]
    assert sorted(cache.resident()) == [0, 1]


def test_what_is_demanded_alone_takes_no_slot_that_is_to_be_kept():
    cache = make(slots=2)
    commit_all(cache, cache.lookup(once([0, 1])))
    assert cache.demand(2, keep=[0, 1]) is None
    load = cache.demand(2, keep=[0])
    assert load is not None and cache.resident() == [0]


def test_what_was_read_ahead_is_no_miss():
    cache = make(slots=2)
    for load in cache.fill_free_slots([0, 1]):
        cache.commit(load, ROW, demanded=False)
    assert (cache.counters.misses, cache.counters.bytes_read, cache.counters.prewarm_bytes) == (0, 0, 2 * ROW)


def test_given_up_as_a_whole_nothing_is_on_its_way():
    cache = make(slots=3)
    cache.lookup(once([0, 1]))
    cache.abort_all()
    check(cache)
    assert not cache.pending and [load.expert for load in cache.lookup(once([0, 1]))] == [0, 1]


def test_an_event_that_finds_no_room_changes_nothing():
    cache = make(slots=3)
    cache.lookup(once([0, 1]))  # left hanging
    pending = dict(cache.pending)
    with pytest.raises(Exception):  # noqa: B017 - a typed error, once it has one
        cache.lookup(once([2, 3, 4]))
    assert cache.pending == pending


class FirstGoes:
    """A policy to which all experts are alike: the first of the candidates gives way."""

    def access(self, used, tokens):
        pass

    def victims(self, candidates, n):
        return list(candidates)[:n]

    def seed(self, rates):
        pass


def test_a_prompt_asks_first_for_what_it_uses_most():
    """What has been used most is computed first, and what is cut off by a lack of room has been used least."""
    cache = LayerCache(8, 2, FirstGoes())
    loads, without_slot = cache.fill({0: 1, 1: 5, 2: 3, 3: 4, 4: 4}, 9)
    assert [load.expert for load in loads] == [1, 3] and without_slot == [4, 2, 0]


def test_among_equals_what_is_resident_stays():
    """Replacing it by an equal would cost a read and win nothing."""
    cache = LayerCache(8, 2, FirstGoes())
    for load in cache.lookup({0: 1, 1: 1}):
        cache.commit(load, 1)
    loads, without_slot = cache.fill({2: 1, 3: 1}, 9)
    assert loads == [] and without_slot == [2, 3] and cache.resident() == [0, 1]


def test_guesses_take_no_more_than_there_is_room_for():
    """Rows that are expected themselves give no slot to other guesses."""
    cache = make(num_experts=6, slots=3)
    for load in cache.lookup(once([0, 1, 2])):
        cache.commit(load, 1)
    loads = cache.guess([0, 1, 3, 4, 5], most=5)
    assert [load.expert for load in loads] == [3]
    check(cache)
