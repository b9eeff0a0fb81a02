"""LayerRuntime and Runtime without a graph or a model, over a store that fails on cue (fault_store.py)."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_offload.errors import ClosedError, ExpertReadError, OffloadError, RoutingError
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.runtime.ahead.scratch_feed import READ_AHEAD_USES
from moe_offload.runtime.prewarm import prewarm_slots
from tests.fakes import fault_store
from tests.fakes.fault_store import LAYOUT, E, FaultStore, K, assert_sound, decode, expected, prefill, run, tags
from tests.fakes.offloaded import SETTINGS, offloaded
from tests.fakes.streams import InstantStreams

EVENTS = [[0, 1], [2, 3, 2], [4, 0], list(range(E)), [5], [6, 1], [7, 6, 5, 4, 3, 2], [0, 1]]


@pytest.fixture(params=["threads", "streams"])
def make(request):
    """A runtime on a CPU, or on a device that runs ahead of the host, which is the CPU all the same."""

    def made(*args, **options):
        if request.param == "streams":
            options["transfer"] = DeviceTransfer(InstantStreams(), reader_threads=1)
        return fault_store.make(*args, **options)

    return made


@pytest.mark.parametrize("slots", [K, 3, 5, E])
@pytest.mark.parametrize("scratch_rows", [1, 3])
def test_every_event_gets_the_right_rows(make, slots, scratch_rows):
    runtime, store = make(slots, scratch_rows=scratch_rows)
    for ids in EVENTS:
        for index, layer in enumerate(runtime.layers):
            assert torch.equal(run(layer, ids), expected(index, ids))
            assert_sound(layer)
    counters = [layer.cache.counters for layer in runtime.layers]
    assert len(store.log) == sum(c.misses for c in counters)
    assert sum(c.bytes_read for c in counters) == len(store.log) * LAYOUT.row_bytes
    assert counters[0].counts == [sum(ids.count(e) for ids in EVENTS) for e in range(E)]
    assert counters[0].requests == sum(len(set(ids)) for ids in EVENTS)


FAULTS = [ExpertReadError("EIO"), "short", KeyboardInterrupt(), MemoryError(), SystemExit()]


@pytest.mark.parametrize("fault", FAULTS, ids=[getattr(type(f), "__name__", f) if f != "short" else f for f in FAULTS])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_the_nth_read_fails(make, fault, lasting):
    """For n = 1, 2, ... until a run meets no fault. The error comes out, nothing is damaged, the same event works next.

    A lasting fault ends after two events."""
    kind = ExpertReadError if fault == "short" else type(fault)
    for n in range(1, 200):
        runtime, store = make(K, FaultStore(n, fault, lasting))
        failed = 0
        for ids in EVENTS:
            for index, layer in enumerate(runtime.layers):
                before = layer.cache.counters.misses
                try:
                    got = run(layer, ids)
                except kind:
                    failed += 1
                    assert_sound(layer)
                    assert layer.cache.counters.misses - before < len(set(ids)), "a read that failed was counted"
                    if lasting:
                        with pytest.raises(kind):
                            run(layer, ids)
                        assert_sound(layer)
                    store.fault = None
                    got = run(layer, ids)
                assert torch.equal(got, expected(index, ids))
                assert_sound(layer)
        if not failed:
            assert n > len(store.log)
            return
        assert failed == 1
    raise AssertionError("the faults never ended")


def test_a_failed_load_leaves_no_mapping_and_its_slot_free(make):
    runtime, store = make(K)
    layer = runtime.layers[0]
    decode(layer, [0, 1])
    store.at, store.fault = len(store.log) + 2, ExpertReadError("EIO")
    with pytest.raises(ExpertReadError):
        decode(layer, [2, 3])
    assert layer.cache.resident() == [2] and len(layer.cache.free) == K - 1, "what has arrived stays"
    assert_sound(layer)
    assert torch.equal(decode(layer, [2, 3]), expected(0, [2, 3]))


def test_a_lasting_fault_neither_hangs_nor_grows(make):
    runtime, _ = make(K, FaultStore(1, ExpertReadError("EIO"), lasting=True))
    layer = runtime.layers[0]
    for _ in range(1000):
        with pytest.raises(ExpertReadError):
            decode(layer, [0, 1])
    assert_sound(layer)
    assert len(layer.cache.free) == K and layer.cache.counters.bytes_read == 0


@pytest.mark.parametrize("ids", [[0, 1], [0, 2], [2, 3]])
def test_an_event_after_one_that_never_waited(make, ids):
    """Ctrl-C between fetch and wait: the wait never comes."""
    runtime, _ = make(K)
    layer = runtime.layers[0]
    layer.fetch(torch.tensor([0, 1]))
    assert torch.equal(decode(layer, ids), expected(0, ids))
    assert_sound(layer)


# Prefill.


def test_prefill_through_k_slots_with_every_expert_at_once(make):
    runtime, store = make(K, scratch_rows=3)
    layer, ids = runtime.layers[1], [*range(E), *reversed(range(E))]
    assert torch.equal(prefill(layer, ids), expected(1, ids))
    assert sorted(store.log) == [(1, e) for e in range(E)], "each row is read once"
    assert layer.cache.counters.streamed == E - K


def test_a_prompt_does_not_flush_what_decoding_uses(make):
    runtime, _ = make(3)
    layer = runtime.layers[0]
    for _ in range(4):
        decode(layer, [5, 6, 7])
    assert torch.equal(prefill(layer, list(range(E))), expected(0, range(E)))
    assert sorted(layer.cache.resident()) == [5, 6, 7]
    assert (layer.cache.counters.hits, layer.cache.counters.streamed) == (9 + 3, E - 3)


def test_a_prompt_replaces_what_it_shows_to_be_out_of_use(make):
    runtime, _ = make(3)
    layer = runtime.layers[0]
    decode(layer, [5, 6, 7])
    ids = [0, 1, 5] * 40 + [2]
    assert torch.equal(prefill(layer, ids), expected(0, ids))
    assert sorted(layer.cache.resident()) == [0, 1, 5]
    assert (layer.cache.counters.hits, layer.cache.counters.misses, layer.cache.counters.streamed) == (1, 6, 1)


def test_the_most_used_get_the_free_slots(make):
    runtime, _ = make(K)
    prefill(runtime.layers[0], [0, 1, 2, 6, 4, 6, 4, 6])
    assert sorted(runtime.layers[0].cache.resident()) == [4, 6]


@pytest.mark.parametrize("step", [decode, prefill])
def test_zero_pairs(make, step):
    runtime, store = make(K)
    assert step(runtime.layers[0], []).shape == (0, 2)
    assert store.log == [] and runtime.layers[0].cache.counters.requests == 0


@pytest.mark.parametrize("step", [decode, prefill])
@pytest.mark.parametrize("bad", [-1, -E, E, 2**40])
def test_ids_outside_the_layer_are_refused_before_anything_happens(make, step, bad):
    runtime, store = make(E)
    layer = runtime.layers[0]
    with pytest.raises(RoutingError, match="layer 0: the router asked for expert"):
        step(layer, [0, bad])
    assert store.log == [] and not any(layer.cache.counters.counts) and not layer.cache.counters.events


# Poison.


def test_free_slots_are_nan(make):
    runtime, _ = make(4)
    layer = runtime.layers[0]
    assert bool(layer.slots.bank_SN.isnan().all())
    decode(layer, [0, 1])
    assert bool(layer.slots.bank_SN[layer.cache.free].isnan().all())
    assert not bool(layer.slots.bank_SN[[layer.cache.slot_of[0], layer.cache.slot_of[1]]].isnan().any())


def test_free_slots_are_nan_after_a_failed_load_too(make):
    runtime, store = make(K)
    layer = runtime.layers[0]
    decode(layer, [0, 1])
    store.at, store.fault = len(store.log) + 1, "short"
    with pytest.raises(ExpertReadError):
        decode(layer, [2, 3])
    assert bool(layer.slots.bank_SN[layer.cache.free].isnan().all())


# Prewarm.


def test_prewarm_fills_free_slots_and_counts_apart(make):
    runtime, _ = make(3)
    layer = runtime.layers[0]
    decode(layer, [7])
    done = []
    prewarm_slots(runtime, [(0, e) for e in [7, 1, 2, 3, 4]], done.append)
    assert sorted(layer.cache.resident()) == [1, 2, 7] and done == [1, 1]
    assert layer.cache.counters.prewarm_bytes == 2 * LAYOUT.row_bytes
    assert (layer.cache.counters.misses, layer.cache.counters.bytes_read) == (1, LAYOUT.row_bytes)
    assert_sound(layer)


@pytest.mark.parametrize("fault", [ExpertReadError("EIO"), KeyboardInterrupt()])
def test_prewarm_stops_cleanly_when_a_read_fails(make, fault):
    runtime, _ = make(3, FaultStore(2, fault))
    layer = runtime.layers[0]
    with pytest.raises(type(fault)):
        prewarm_slots(runtime, [(0, 0), (0, 1), (0, 2)])
    assert layer.cache.resident() == [0]
    assert_sound(layer)
    assert torch.equal(decode(layer, [1, 2, 3]), expected(0, [1, 2, 3]))


def test_prewarm_goes_across_layers_in_the_order_given(make):
    runtime, store = make(3)
    prewarm_slots(runtime, [(1, 5), (0, 2), (1, 6), (0, 1), (0, 0), (1, 7)])
    assert store.log == [(1, 5), (0, 2), (1, 6), (0, 1), (0, 0), (1, 7)]
    assert sorted(runtime.layers[1].cache.resident()) == [5, 6, 7]


def test_prewarm_gives_up_what_an_interrupted_event_left_behind(make):
    runtime, _ = make(3)
    layer = runtime.layers[0]
    layer.fetch(torch.tensor([4]))  # and no wait
    prewarm_slots(runtime, [(0, 0), (0, 1), (0, 2)])
    assert sorted(layer.cache.resident()) == [0, 1, 2]
    assert_sound(layer)


@pytest.mark.parametrize(("tokens", "trims"), [(1, 0), (63, 0), (64, 1)])
def test_the_heap_is_trimmed_after_prompts_only(tokens, trims, monkeypatch):
    trimmed = []
    monkeypatch.setattr("moe_offload.runtime.layer.trim_heap", lambda: trimmed.append(1))
    runtime, _ = fault_store.make(K)
    layer = runtime.layers[0]
    prefill(layer, [0, 1] * tokens)
    assert len(trimmed) == trims
    layer.trims_heap = False
    prefill(layer, [0, 1] * tokens)
    assert len(trimmed) == trims
    prefill(layer, [0, 1] * 513)
    assert len(trimmed) == trims + 1


@pytest.mark.parametrize(("reserve", "trims"), [("400MB", [True, True, True]), ("600MB", [False, False, True])])
def test_the_heap_is_trimmed_between_layers_where_the_reserve_is_small(reserve, trims):
    model = offloaded(layers=3, budget="1GB", config=replace(SETTINGS, reserve=reserve))
    assert [layer.trims_heap for layer in model.moe_offload._runtime.layers] == trims


def test_prewarm_stops_cleanly_when_interrupted_between_reads(make):
    runtime, _ = make(3)
    layer = runtime.layers[0]

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prewarm_slots(runtime, [(0, 0), (0, 1), (0, 2)], interrupt)
    assert_sound(layer)
    assert torch.equal(decode(layer, [3, 4, 5]), expected(0, [3, 4, 5]))


# The whole runtime.


def test_layers_share_scratch_and_store_but_nothing_else(make):
    runtime, _ = make(K)
    first, second = runtime.layers
    decode(first, [0, 1])
    assert second.cache.resident() == [] and second.cache.counters.events == 0
    assert torch.equal(prefill(second, list(range(E))), expected(1, range(E)))
    assert torch.equal(decode(first, [1, 0]), expected(0, [1, 0]))


def test_read_stacked_gives_every_field_of_every_expert(make):
    stacked = make()[0].read_stacked(1)
    assert torch.equal(stacked["w"], expected(1, range(E))[:, :1].expand(E, 3))
    assert torch.equal(stacked["b"], expected(1, range(E))[:, :1])


def test_close_gives_everything_back_once(make):
    runtime, store = make()
    decode(runtime.layers[0], [0, 1])
    runtime.check_open()
    runtime.close()
    runtime.close()
    assert store.closed == 1 and runtime.closed
    for layer in runtime.layers:
        assert layer.slots.bytes.numel() == layer.arrivals.scratch_rows.bytes.numel() == 0
        with pytest.raises(ClosedError):
            layer.experts(torch.zeros(1, 1), torch.zeros(1, K, dtype=torch.int64), torch.ones(1, K))
    for use in (runtime.check_open, lambda: runtime.read_stacked(0)):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_experts_weights_and_sums_over_k(make):
    runtime, _ = make()
    layer = runtime.layers[0]
    layer.module_core = tags
    ids, weights = torch.tensor([[1, 2], [3, 1], [7, 0]]), torch.tensor([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]])
    out = layer.experts(torch.zeros(3, 5), ids, weights)
    assert out[:, 0].tolist() == [2.0, 2.0, 7.0]


def test_close_while_something_is_being_traced(make):
    """A model may be collected at any time, and Dynamo makes no real tensors then."""
    runtime, _ = make()
    with FakeTensorMode():
        runtime.close()
    assert all(layer.slots.bytes.numel() == 0 for layer in runtime.layers)


def test_every_error_here_is_one_of_ours():
    for error in (RoutingError, ClosedError, ExpertReadError):
        assert issubclass(error, OffloadError)


# Reading ahead: what one layer's prefill leaves of scratch is filled with what the next will ask for.


def ahead(runtime):
    """The experts read ahead, and for which layer."""
    scratch = runtime.layers[0].arrivals.scratch
    return scratch._layer, sorted(scratch.ahead)


def long_prompt(*without):
    return [e for e in range(E) if e not in without] * 3


def test_a_long_prompt_reads_ahead_for_the_next_layer(make):
    runtime, store = make(slots=2, scratch_rows=3)
    first, second = runtime.layers
    assert torch.equal(prefill(first, long_prompt()), expected(0, long_prompt()))
    assert ahead(runtime)[0] == 1 and len(ahead(runtime)[1]) == 3
    assert torch.equal(prefill(second, long_prompt()), expected(1, long_prompt()))
    counters = second.cache.counters
    assert (counters.ahead, counters.misses, counters.wasted_bytes) == (3, E, 0)
    assert sorted(store.log) == [(layer, e) for layer in (0, 1) for e in range(E)], "every row was read once"
    assert ahead(runtime) == (-1, [])
    assert_sound(first)
    assert_sound(second)


def test_what_was_read_ahead_in_vain_is_counted_and_harms_nothing(make):
    runtime, _ = make(slots=2, scratch_rows=3)
    first, second = runtime.layers
    prefill(first, long_prompt())
    guessed = ahead(runtime)[1]
    assert all(held.ticket.done.wait(120) for held in second.arrivals.scratch.ahead.values())
    ids = long_prompt(guessed[0])
    assert torch.equal(prefill(second, ids), expected(1, ids))
    assert second.cache.counters.ahead == 2
    assert second.cache.counters.misses == E - 1
    assert second.cache.counters.wasted_bytes == LAYOUT.row_bytes


def test_another_layer_s_event_drops_what_was_read_ahead(make):
    runtime, _ = make(slots=2, scratch_rows=3)
    first, second = runtime.layers
    prefill(first, long_prompt())
    assert torch.equal(prefill(first, long_prompt()), expected(0, long_prompt()))  # streams through the same scratch
    assert ahead(runtime)[0] == 1
    assert torch.equal(decode(second, [3, 5]), expected(1, [3, 5]))
    assert ahead(runtime) == (-1, [])
    assert_sound(second)


def test_what_an_event_waits_for_before_it_begins_counts_as_waiting(make, monkeypatch):
    runtime, _ = make(slots=2, scratch_rows=3)
    first = runtime.layers[0]
    prefill(first, long_prompt())
    real = first.arrivals.transfer.cancel
    monkeypatch.setattr(first.arrivals.transfer, "cancel", lambda tickets: time.sleep(0.02) or real(tickets))
    before = first.cache.counters.stall_s
    first.arrivals.begin([0])  # drops what was read ahead for the other layer
    assert first.cache.counters.stall_s >= before + 0.02


def test_a_row_read_ahead_goes_on_to_its_slot(make):
    runtime, _ = make(slots=4, scratch_rows=3)
    first, second = runtime.layers
    prefill(first, long_prompt())
    guessed = ahead(runtime)[1]
    assert torch.equal(decode(second, guessed[:2]), expected(1, guessed[:2]))
    assert second.cache.counters.ahead == 2
    assert set(guessed[:2]) <= set(second.cache.resident())
    assert_sound(second)


def test_a_short_prompt_reads_nothing_ahead(make):
    runtime, _ = make(slots=2, scratch_rows=3)
    prefill(runtime.layers[0], list(range(E)))
    assert ahead(runtime) == (-1, [])
    prefill(runtime.layers[0], list(range(E)) * READ_AHEAD_USES)
    assert ahead(runtime)[0] == 1, "two uses of each expert are enough"


def test_what_has_been_used_most_is_read_ahead(make):
    runtime, _ = make(slots=2, scratch_rows=3)
    first, second = runtime.layers
    for e in (7, 6, 6, 5, 5, 5, *[0] * 5, *[1] * 5):  # the last two are resident
        decode(second, [e])
    prefill(first, long_prompt())
    assert ahead(runtime) == (1, [5, 6, 7])


def test_a_trace_has_every_id_of_a_prompt(make):
    """On a device, too, where the host hears no more than the counts of a prompt unless it writes a trace."""
    runtime, _ = make(slots=2, scratch_rows=3)
    events = []
    runtime.record_trace(SimpleNamespace(event=lambda layer, ids, tokens: events.append(ids)))
    prefill(runtime.layers[0], long_prompt())
    assert events == [long_prompt()]


def test_a_failed_read_ahead_is_the_next_layer_s_error_and_leaves_it_sound(make):
    runtime, _ = make(slots=2, scratch_rows=3, store=FaultStore(at=E + 2, fault=ExpertReadError("on purpose")))
    first, second = runtime.layers
    assert torch.equal(prefill(first, long_prompt()), expected(0, long_prompt()))
    with pytest.raises(ExpertReadError, match="on purpose"):
        prefill(second, long_prompt())
    assert_sound(second)
    assert torch.equal(prefill(second, long_prompt()), expected(1, long_prompt()))
