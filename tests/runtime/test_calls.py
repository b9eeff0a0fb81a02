"""Experts that are asked for one by one: what is in use stays, and calls make events (over fault_store.py)."""

from __future__ import annotations

import pytest

from moe_offload.errors import UnsupportedModelError
from moe_offload.runtime.calls import Calls
from tests.fakes.fault_store import assert_sound, make


@pytest.fixture(params=[2, 3])
def layer(request):
    runtime, _ = make(request.param)
    yield runtime.layers[0]
    runtime.close()


def use(calls: Calls, *experts: int) -> None:
    for expert in experts:
        row = calls.arrivals.slots.bank_SN[calls.begin(expert, rows=1)]
        assert bool((row == expert).all())
        calls.end()


def test_an_event_ends_where_an_expert_is_asked_for_again(layer):
    calls, counters = Calls(layer.arrivals), layer.cache.counters
    use(calls, 3, 1)
    assert counters.events == 0, "it may go on"
    use(calls, 3)
    assert (counters.events, counters.hits, counters.misses) == (1, 1, 2)
    assert [counters.counts[e] for e in (1, 3)] == [1, 1]
    calls.end_event()
    assert (counters.events, counters.counts[3]) == (2, 2)
    assert_sound(layer)


def test_what_is_in_use_gives_way_to_nothing(layer):
    calls = Calls(layer.arrivals)
    slots = [calls.begin(e, rows=1) for e in range(layer.cache.slots)]
    for outer in range(layer.cache.slots):
        assert bool((calls.arrivals.slots.bank_SN[slots[outer]] == outer).all())
    with pytest.raises(UnsupportedModelError, match=f"expert 7 is called inside of {len(slots)} other experts"):
        calls.begin(7, rows=1)
    assert sorted(layer.cache.resident()) == list(range(layer.cache.slots))


def test_what_is_expected_stays_while_there_is_another_slot():
    layer = make(3)[0].layers[0]
    calls = Calls(layer.arrivals)
    use(calls, 4, 0, 2)  # 4 has not been used for longest
    calls.end_event()
    calls.expect([4, 5])
    use(calls, 1)
    assert layer.cache.slot_of[4] >= 0
    use(calls, 5, 4)
    assert layer.cache.counters.ahead == 1
    assert_sound(layer)
