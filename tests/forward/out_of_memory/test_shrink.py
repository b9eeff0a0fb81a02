"""Fewer slots in a runtime that is in use, without a model: what is given back, what stays, what is dropped."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from moe_offload.errors import ClosedError, OffloadError
from moe_offload.forward.out_of_memory import shrink as shrinking
from moe_offload.forward.out_of_memory.shrink import halve_spare_slots, shrink_banks
from moe_offload.runtime.kernels import KERNELS
from moe_offload.runtime.kernels.state import REFUSED
from tests.fakes.fault_store import LAYOUT, E, K, assert_sound, decode, expected, make, prefill, run


def used(slots=6):
    runtime, store = make(slots, scratch_rows=3)
    for layer in runtime.layers:
        for ids in ([5, 6], [5, 6], [0, 1], [2]):
            decode(layer, ids)
    return runtime, store


def test_half_of_what_is_above_the_floor():
    assert halve_spare_slots([8, 7, 3, 2, 1], [2, 2, 2, 2, 1]) == [5, 4, 2, 2, 1]


def test_old_banks_are_gone_and_counters_and_scores_go_on():
    runtime, _ = used()
    first = runtime.layers[0]
    old = [weakref.ref(layer.slots.bytes) for layer in runtime.layers]
    misses, scores = first.cache.counters.misses, list(first.cache.policy.rate.used)
    assert shrink_banks(runtime) == 2 * 2 * LAYOUT.row_bytes and runtime.slots == (4, 4)
    gc.collect()
    assert not any(bank() is not None for bank in old)
    assert first.cache.counters.misses == misses and first.cache.policy.rate.used == scores
    assert first.slots.bank_SN.shape[0] == 4 and first.cache.resident() == []
    for ids in ([5, 6], [0, 1], [2, 3]):
        for index, layer in enumerate(runtime.layers):
            assert torch.equal(run(layer, ids), expected(index, ids))
            assert_sound(layer)
    assert set(first.cache.resident()) >= {5, 6, 2, 3}, "5 and 6 were used most before"


def test_the_floor_stands_and_then_nothing_is_changed():
    runtime, _ = used()
    while shrink_banks(runtime):
        pass
    assert runtime.slots == (K, K)
    bank = runtime.layers[0].slots.bank_SN
    assert shrink_banks(runtime) == 0 and runtime.layers[0].slots.bank_SN is bank
    for index, layer in enumerate(runtime.layers):
        assert torch.equal(prefill(layer, list(range(E))), expected(index, range(E)))
        assert_sound(layer)


def test_what_is_under_way_is_waited_for_and_dropped():
    runtime, _ = used()
    first, second = runtime.layers
    first.fetch(torch.tensor([3, 4]))  # and no wait
    prefill(first, [*range(E)] * 3)
    assert second.arrivals.scratch.ahead
    second.fetch(torch.tensor([7]))
    shrink_banks(runtime)
    assert not second.arrivals.scratch.ahead and not any(layer.arrivals.under_way for layer in runtime.layers)
    assert runtime.depth().nbytes == 0
    for index, layer in enumerate(runtime.layers):
        assert torch.equal(decode(layer, [3, 4]), expected(index, [3, 4]))
        assert_sound(layer)


@pytest.fixture
def device_runtime():
    runtime, _ = make(6)
    rows = [torch.arange(E).float().add(100 * i).view(E, 1).expand(E, LAYOUT.row_bytes // 4) for i in range(2)]
    runtime.decide_on_device({i: each.contiguous() for i, each in enumerate(rows)}, 32.0, KERNELS["cpu"]())
    runtime.layers[0].take_over([2])
    return runtime


def test_a_device_that_decides_goes_on_with_a_smaller_table(device_runtime):
    for ids in ([5, 6], [0, 1]):
        device_runtime.layers[0].place(torch.tensor(ids))
    assert shrink_banks(device_runtime) == 2 * 2 * LAYOUT.row_bytes
    assert not device_runtime.device_caches.in_charge
    device_runtime.layers[0].take_over([2])
    for ids in ([5, 6], [2, 3], [5, 6]):
        slots_P = device_runtime.layers[0].place(torch.tensor(ids))
        assert device_runtime.layers[0].slots.bank_SN[slots_P, 0].tolist() == ids
    assert len(device_runtime.layers[0].device_cache.state.expert_at_S) == 4
    assert device_runtime.layers[0].counters.requests == 10 and device_runtime.layers[0].resident == 4


@pytest.mark.parametrize("readable", [True, False])
def test_what_the_device_holds_no_longer_and_cannot_read_is_the_hosts(readable):
    """Layer 0 had a slot for every expert, and rests where the device cannot read."""
    runtime, _ = make(E)
    rows_EN = (torch.arange(E).float() + 100).view(E, 1).expand(E, LAYOUT.row_bytes // 4).contiguous()
    runtime.decide_on_device({0: None, 1: rows_EN} if readable else {0: None}, 32.0, KERNELS["cpu"]())
    first, second = runtime.layers
    first.take_over([2])
    assert first.slots.bank_SN[first.place(torch.tensor([3, 4])), 0].tolist() == [3, 4] and runtime.device_layers
    shrink_banks(runtime)
    assert runtime.device_layers == ({1} if readable else set()) and (runtime.device_caches is not None) == readable
    if readable:
        second.take_over([2])
        assert second.slots.bank_SN[second.place(torch.tensor([5, 1])), 0].tolist() == [105, 101]
    for layer in runtime.layers:
        ids = torch.tensor([6, 7])
        assert torch.equal(layer.slots.bank_SN[layer.place(ids), 0], expected(layer.moe.index, [6, 7])[:, 0])


def test_a_bank_that_was_full_goes_on_where_the_device_can_read_its_rows():
    """Until then nothing is gathered: every row has come through the host, once."""
    runtime, store = make(E)
    rows_EN = torch.arange(E).float().view(E, 1).expand(E, LAYOUT.row_bytes // 4).contiguous()
    runtime.decide_on_device({0: rows_EN}, 32.0, KERNELS["cpu"]())
    first, _ = runtime.layers
    first.take_over([2])
    assert sorted(store.log) == [(0, e) for e in range(E)]
    shrink_banks(runtime)
    assert runtime.device_layers == {0} and first.slots.bank_SN.shape[0] < E
    first.take_over([2])
    for ids in ([6, 7], [0, 1], [2, 3], [4, 5]):
        assert first.slots.bank_SN[first.place(torch.tensor(ids)), 0].tolist() == ids
    assert len(store.log) == E


def test_an_id_that_no_expert_has_comes_before_any_lack_of_memory(device_runtime):
    device_runtime.device_caches._block.totals_L4[1, REFUSED] = 1
    with pytest.raises(OffloadError, match="layer 1"):
        shrink_banks(device_runtime)
    assert device_runtime.slots == (6, 6) and device_runtime.layers[0].slots.bank_SN.shape[0] == 6


def lacking(monkeypatch, runtime, most):
    """A device that has room for banks of at most so many slots."""
    layer = type(runtime.layers[0])
    real = layer._rows

    def rows(self, slots):
        if slots > most:
            raise torch.OutOfMemoryError("no")
        return real(self, slots)

    monkeypatch.setattr(layer, "_rows", rows)


def test_where_even_less_does_not_fit_the_floor_is_tried(monkeypatch):
    runtime, _ = used()
    lacking(monkeypatch, runtime, K)
    assert shrink_banks(runtime) == 2 * (6 - K) * LAYOUT.row_bytes and runtime.slots == (K, K)
    for index, layer in enumerate(runtime.layers):
        assert torch.equal(decode(layer, [3, 4]), expected(index, [3, 4]))


def test_where_nothing_fits_the_model_is_closed_and_says_so(monkeypatch):
    runtime, store = used()
    lacking(monkeypatch, runtime, 0)
    with pytest.raises(OffloadError, match=r"has no memory left.*load it again") as caught:
        shrink_banks(runtime)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert runtime.closed and store.closed == 1
    with pytest.raises(ClosedError):
        runtime.check_open()


def test_memory_goes_back_between_the_old_banks_and_the_new(monkeypatch):
    runtime, _ = used()
    old, seen = [weakref.ref(layer.slots.bytes) for layer in runtime.layers], []
    monkeypatch.setattr(
        shrinking, "release_unused", lambda device: seen.append((device, [bank() is None for bank in old]))
    )
    shrink_banks(runtime)
    assert seen == [("cpu", [True, True])]
