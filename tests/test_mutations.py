"""Bugs put in on purpose: the oracle that says "exact" must notice each of them, or it says nothing.

The oracle runs a tiny gpt_oss (its experts have biases) through K slots: one session that a read error cuts short, then
a whole one, compared bit for bit with the unmodified graph.
"""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch

from moe_offload import ExpertReadError, OffloadConfig, optimize
from moe_offload.cache import LayerCache, Load
from moe_offload.experts import find_experts, is_experts
from moe_offload.families.session import run_session
from moe_offload.families.tiny import build
from moe_offload.measure import costs, layer_shapes
from moe_offload.plan import floor
from moe_offload.runtime import LayerRuntime
from moe_offload.stores.host import HostStore

slots_pass = importlib.import_module("passes.slots")  # the name `passes.slots` is the pass itself

SESSION = {"prompt": 6, "new_tokens": 8}
FAILING_READ = 14  # in decode, where each load takes the slot of another row


def tiny():
    return build("gpt_oss", num_hidden_layers=1)


@pytest.fixture(scope="module")
def references():
    known = {}
    for implementation in ("grouped_mm", "batched_mm"):
        torch._dynamo.reset()
        model = tiny()
        for module in filter(is_experts, model.modules()):
            module.config._experts_implementation = implementation
        model.compile(backend="eager", dynamic=True)
        known[implementation] = run_session(model, "lm", **SESSION)
    return known


def offloaded(implementation):
    torch._dynamo.reset()
    model = tiny()
    config = OffloadConfig(
        experts_implementation=implementation, compile="graph", poison=True, kv_tokens=64, wave_rows=2
    )
    banks = find_experts(model)
    return optimize(model, floor(layer_shapes(banks), costs(model, banks, config)), device_map="cpu", config=config)


def fail_once(model, at):
    """Let read number `at` of this model raise, and no other. Returns the list of reads, which grows."""
    store, reads = model.moe_offload._runtime.layers[0].store, []
    real = store.read

    def read(layer, expert, row):
        reads.append(expert)
        if len(reads) == at:
            raise ExpertReadError("on purpose")
        return real(layer, expert, row)

    store.read = read
    return reads


def finds_a_fault(implementation, reference):
    """The oracle: whether anything is raised, or any output differs from the reference in any bit."""
    model = offloaded(implementation)
    reads = fail_once(model, FAILING_READ)
    try:
        with contextlib.suppress(ExpertReadError):
            run_session(model, "lm", **SESSION)
        if len(reads) != FAILING_READ:
            return True  # the tokens led elsewhere
        outputs = run_session(model, "lm", **SESSION)
    except Exception:
        return True
    finally:
        model.moe_offload.close()
    return not all(torch.equal(a, b) for a, b in zip(reference, outputs, strict=True))


# The mutations: each patches one thing.


def wait_names_the_next_slot(patch):
    real = LayerRuntime.wait
    patch.setattr(LayerRuntime, "wait", lambda self, ticket: (real(self, ticket) + 1) % self.cache.slots)


def biases_keep_the_true_ids(patch):
    real = slots_pass._rename

    def rename(graph, site):
        real(graph, site)
        for read in site.reads:
            if read.node.meta["example_value"].dim() == 2:  # a bias: one vector per pair
                slots_P = next(node for node in read.node.all_input_nodes if node not in site.weights.values())
                read.node.replace_input_with(slots_P, site.ids)

    patch.setattr(slots_pass, "_rename", rename)


def lookup_protects_nothing(patch):
    def lookup(self, experts, tokens=1):
        self._record(experts, tokens)
        missing = [e for e in experts if self.slot_of[e] < 0]
        candidates = self.resident()
        return [self._admit(e, candidates) for e in missing]

    patch.setattr(LayerCache, "lookup", lookup)


def half_a_row_is_committed(patch):
    def read(self, layer, expert, row):
        data = self._rows[layer][expert].numpy().data
        row[: len(row) // 2] = data[: len(row) // 2]
        return len(row)

    patch.setattr(HostStore, "read", read)


def the_neighbour_is_read(patch):
    real = HostStore.read
    patch.setattr(HostStore, "read", lambda self, layer, e, row: real(self, layer, max(0, e - 1), row))


def the_histogram_keeps_its_size(patch):
    patch.setattr(slots_pass, "_shrink_histogram", lambda site, count: None)


def a_victim_stays_mapped(patch):
    def admit(self, expert, candidates):
        if self.free:
            slot = self.free.pop()
        else:
            victim = self.policy.victim(candidates)
            candidates.remove(victim)
            slot = self.slot_of[victim]
        load = self.pending[expert] = Load(expert, slot)
        return load

    def commit(self, load, nbytes, demanded=True):
        old = self.expert_at[load.slot]
        if old >= 0 and self.slot_of[old] == load.slot:
            self.slot_of[old] = -1  # right as long as every load arrives
        real(self, load, nbytes, demanded)

    real = LayerCache.commit
    patch.setattr(LayerCache, "_admit", admit)
    patch.setattr(LayerCache, "commit", commit)


def scratch_rows_are_swapped(patch):
    real = LayerRuntime._load_scratch
    patch.setattr(LayerRuntime, "_load_scratch", lambda self, wave: real(self, wave[::-1]))


MUTATIONS = [
    (wait_names_the_next_slot, "grouped_mm"),
    (wait_names_the_next_slot, "batched_mm"),
    (biases_keep_the_true_ids, "batched_mm"),
    (lookup_protects_nothing, "grouped_mm"),
    (half_a_row_is_committed, "grouped_mm"),
    (the_neighbour_is_read, "grouped_mm"),
    (the_histogram_keeps_its_size, "grouped_mm"),
    (a_victim_stays_mapped, "grouped_mm"),
    (scratch_rows_are_swapped, "batched_mm"),
]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_oracle_finds_nothing_in_the_product(references, implementation):
    assert not finds_a_fault(implementation, references[implementation])


@pytest.mark.parametrize(("mutate", "implementation"), MUTATIONS, ids=[f"{m.__name__}-{i}" for m, i in MUTATIONS])
def test_a_mutation_is_found(references, monkeypatch, mutate, implementation):
    mutate(monkeypatch)
    assert finds_a_fault(implementation, references[implementation])
