"""Bugs put in on purpose: the oracle that says "exact" must notice each of them, or it says nothing.

The oracle runs a tiny gpt_oss (its experts have biases) through K slots: one session that a read error cuts short, then
a whole one, compared bit for bit with the unmodified graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time

import pytest
import torch
from torch import Tensor

from moe_offload import ExpertReadError, OffloadConfig, optimize
from moe_offload.apps.families.session import run_session
from moe_offload.apps.families.tiny import build
from moe_offload.cache import POLICIES
from moe_offload.cache.layer_cache import LayerCache, Load
from moe_offload.experts import find_experts, is_experts
from moe_offload.memory.buffers import POISON
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.stores.row_read import RowRead
from moe_offload.memory.transfer.threads import ThreadTransfer
from moe_offload.plan.budget import floor_budget
from moe_offload.plan.weights import layer_shapes, sum_costs
from moe_offload.runtime.in_flight import Arrivals
from moe_offload.runtime.layer import LayerRuntime

slots_pass = importlib.import_module("passes.slots")

SESSION = {"prompt": 6, "new_tokens": 8}
FAILING_READ = 9  # in decode, where each load takes the slot of another row


def tiny():
    return build("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])


def offloaded(implementation, overlap):
    model = tiny()
    config = OffloadConfig(
        experts_implementation=implementation, compile="graph", overlap=overlap, poison=True, kv_tokens=64, wave_rows=2
    )
    moe_layers = find_experts(model)
    return optimize(
        model,
        floor_budget(layer_shapes(moe_layers), sum_costs(model, moe_layers, config)),
        device_map="cpu",
        config=config,
    )


@pytest.fixture(scope="module")
def references():
    """What the unmodified model gives with either implementation."""
    torch._dynamo.reset()
    known = {}
    for implementation in ("grouped_mm", "batched_mm"):
        model = tiny()
        for module in filter(is_experts, model.modules()):
            module.config._experts_implementation = implementation
        known[implementation] = run_session(model, "lm", **SESSION)
    return known


@pytest.fixture(scope="module")
def compiled():
    """Offloaded models whose graphs are compiled once; each test gives them an empty cache."""
    return {(i, overlap): offloaded(i, overlap) for i in ("grouped_mm", "batched_mm") for overlap in (True, False)}


def empty(model):
    (layer,) = model.moe_offload._runtime.layers
    policy = POLICIES["decayed_lfu"](layer.cache.num_experts, 32.0)
    layer.arrivals.cache = LayerCache(layer.cache.num_experts, layer.cache.slots, policy)
    layer.slots.bytes.fill_(POISON)
    assert not layer.arrivals.awaited
    return layer


def finds_a_fault(model, reference, patch):
    """The oracle: whether anything is raised, or any output differs from the reference in any bit."""
    layer, reads = empty(model), []
    real = layer.store.begin

    def begin(index, expert, row):
        reads.append(expert)
        if len(reads) == FAILING_READ:
            raise ExpertReadError("on purpose")
        return real(index, expert, row)

    patch.setattr(layer.store, "begin", begin)
    try:
        with contextlib.suppress(ExpertReadError):
            run_session(model, "lm", **SESSION)
        if len(reads) != FAILING_READ:
            return True  # the tokens led elsewhere
        outputs = run_session(model, "lm", **SESSION)
    except Exception:
        return True
    return not all(torch.equal(a, b) for a, b in zip(reference, outputs, strict=True))


# The mutations: each patches one thing.


def wait_names_the_next_slot(patch):
    real = LayerRuntime.wait
    patch.setattr(LayerRuntime, "wait", lambda self, ticket: (real(self, ticket) + 1) % self.cache.slots)


def biases_keep_the_true_ids(patch):
    real = slots_pass._read_bank

    def read_bank(graph, site, moe, slots_P):
        real(graph, site, moe, slots_P)
        for read in site.reads:
            if read.offsets is None and read.node.meta["example_value"].dim() == 2:  # one vector per pair
                read.node.replace_input_with(slots_P, site.reader_ids)

    patch.setattr(slots_pass, "_read_bank", read_bank)


def weights_keep_the_true_ids(patch):
    real = slots_pass._read_bank
    patch.setattr(slots_pass, "_read_bank", lambda graph, site, moe, _: real(graph, site, moe, site.reader_ids))


def lookup_protects_nothing(patch):
    def lookup(self, used, tokens=1):
        self._record(used, tokens)
        return self._admit([e for e in used if self.slot_of[e] < 0], self.resident())

    patch.setattr(LayerCache, "lookup", lookup)


def half_a_row_is_committed(patch):
    def begin(self, layer, expert, row):
        data = self._rows[layer][expert].numpy().data

        def half():
            row[: len(row) // 2] = data[: len(row) // 2]

        return RowRead([half], lambda: len(row))

    patch.setattr(HostStore, "begin", begin)


def the_neighbour_is_read(patch):
    real = HostStore.begin
    patch.setattr(HostStore, "begin", lambda self, layer, e, row: real(self, layer, max(0, e - 1), row))


def nobody_waits(patch):
    real = HostStore.begin

    def begin(self, layer, expert, row):
        read = real(self, layer, expert, row)
        return RowRead([lambda: time.sleep(0.02), *read.parts], read.finish)

    patch.setattr(HostStore, "begin", begin)
    patch.setattr(ThreadTransfer, "wait", lambda self, ticket: 0)


def a_victim_stays_mapped(patch):
    def admit(self, experts, candidates):
        n = len(experts) - len(self.free)
        victims = self.policy.victims(candidates, n) if n > 0 else []
        slots = [self.free.pop() for _ in range(len(experts) - len(victims))] + [self.slot_of[v] for v in victims]
        loads = [Load(e, slot) for e, slot in zip(experts, slots, strict=True)]
        self.pending.update((load.expert, load) for load in loads)
        return loads

    def commit(self, load, nbytes, demanded=True):
        old = self.expert_at[load.slot]
        if old >= 0 and self.slot_of[old] == load.slot:
            self.slot_of[old] = -1  # right as long as every load arrives
        real(self, load, nbytes, demanded)

    real = LayerCache.commit
    patch.setattr(LayerCache, "_admit", admit)
    patch.setattr(LayerCache, "commit", commit)


def scratch_rows_are_swapped(patch):
    real = Arrivals.take

    def take(self, demanded=True):
        arrival = real(self, demanded)
        return arrival if arrival.load else dataclasses.replace(arrival, scratch_row=(arrival.scratch_row + 1) % 2)

    patch.setattr(Arrivals, "take", take)


def rows_go_to_the_neighbour_s_slot(patch):
    real = Arrivals.take

    def take(self, demanded=True):
        arrival = real(self, demanded)
        if arrival.load is None:
            return arrival
        wrong = Load(arrival.expert, (arrival.load.slot + 1) % self.cache.slots)
        return dataclasses.replace(arrival, load=wrong)

    patch.setattr(Arrivals, "take", take)


def results_go_to_the_next_pair(patch):
    real = Tensor.index_copy_
    patch.setattr(Tensor, "index_copy_", lambda out, dim, rows, part: real(out, dim, (rows + 1) % len(out), part))


IN_THE_RUNTIME = [
    lookup_protects_nothing,
    half_a_row_is_committed,
    the_neighbour_is_read,
    a_victim_stays_mapped,
    scratch_rows_are_swapped,
    nobody_waits,
]
IN_ONE_WAY_TO_DECODE = [
    (wait_names_the_next_slot, False),
    (rows_go_to_the_neighbour_s_slot, True),
    (results_go_to_the_next_pair, True),
]
IN_A_PASS = [(biases_keep_the_true_ids, "batched_mm"), (weights_keep_the_true_ids, "grouped_mm")]
implementations = pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
overlaps = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "wait"])


@implementations
@overlaps
def test_the_oracle_finds_nothing_in_the_product(references, compiled, monkeypatch, implementation, overlap):
    assert not finds_a_fault(compiled[implementation, overlap], references[implementation], monkeypatch)


@implementations
@overlaps
@pytest.mark.parametrize("mutate", IN_THE_RUNTIME)
def test_a_mutation_of_the_runtime_is_found(references, compiled, monkeypatch, mutate, implementation, overlap):
    mutate(monkeypatch)
    assert finds_a_fault(compiled[implementation, overlap], references[implementation], monkeypatch)


@implementations
@pytest.mark.parametrize(("mutate", "overlap"), IN_ONE_WAY_TO_DECODE)
def test_a_mutation_of_one_way_to_decode_is_found(references, compiled, monkeypatch, mutate, implementation, overlap):
    mutate(monkeypatch)
    assert finds_a_fault(compiled[implementation, overlap], references[implementation], monkeypatch)


@pytest.mark.parametrize(("mutate", "implementation"), IN_A_PASS)
def test_a_mutation_of_a_pass_is_found(references, monkeypatch, mutate, implementation):
    mutate(monkeypatch)
    model = offloaded(implementation, overlap=False)
    assert finds_a_fault(model, references[implementation], monkeypatch)
    model.moe_offload.close()
