"""Layers decided one by one: those in RAM by the device, those on disk by the host, in one decode graph."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moe_offload import ExpertReadError, OffloadConfig, RoutingError
from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts
from moe_offload.forward.graphs import compiling
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.transfer import pinned
from moe_offload.runtime.assemble import on_device
from passes import ops
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, resident, say

DEVICE = replace(SETTINGS, decide="device", policy="decayed_lfu")
BANK = SimpleNamespace(num_experts=8, called=False)
HOST = replace(DEVICE, decide="host", overlap=False)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def mixed(family=QWEN, settings=DEVICE, layers=3, on_disk=(1,), residency=0.5, **options):
    """A model in which MoE layers `on_disk` rest on disk, all others in RAM."""
    model = build(family, num_hidden_layers=layers)
    names = [moe.name for moe in find_experts(model)]
    where = {"": "cpu", **{names[i]: "disk" for i in on_disk}}
    return offload(model, residency, config=settings, device_map=where, **options)


def state_of(model):
    """Every counter but `by_device`, and what is in which slot.

    Three depend on when a thread got its turn, and differ between two runs by the host as well (`late` was seen to).
    """
    timed = {"stall_s": 0.0, "late": 0, "wasted_bytes": 0}
    model.moe_offload._runtime.hand_back()
    caches = [layer.cache for layer in model.moe_offload._runtime.layers]
    counters = [replace(cache.counters, by_device=0, **timed) for cache in caches]
    return counters, [cache.expert_at for cache in caches], [cache.policy.rate.used for cache in caches]


@pytest.mark.parametrize(
    ("family", "layers", "on_disk"),
    [
        (QWEN, 3, (1,)),
        pytest.param("gpt_oss", 2, (0,), marks=pytest.mark.long),
        pytest.param("deepseek_v3", 3, (1,), marks=pytest.mark.long),
    ],
)
def test_tokens_logits_and_counters_are_those_of_the_host_and_of_the_resident_model(family, layers, on_disk):
    plain = resident(family, layers=layers)
    want = say(plain)
    with torch.no_grad():
        logits = plain(want).logits
    seen = []
    for settings in (DEVICE, HOST):
        torch._dynamo.reset()
        model = mixed(family, settings, layers, on_disk)
        assert torch.equal(say(model), want), settings.decide
        stats = model.moe_offload.stats()
        assert torch.equal(model(want).logits, logits), settings.decide
        seen.append(state_of(model))
        for i, layer in enumerate(stats.layers):
            if settings is DEVICE and i not in on_disk:
                assert layer.decides == "device" and layer.by_device == 19, "all but the prompt"
            else:
                assert layer.decides == "host" and layer.by_device == 0
            assert layer.events == 20 and layer.misses > 0
        model.moe_offload.close()
    assert seen[0] == seen[1]


def test_the_summary_says_how_much_the_host_decided():
    model = mixed()
    say(model)
    said = "the device decides in 2 of 3 layers: it did in 38 of 60 events, the host in 22"
    assert said in str(model.moe_offload)
    stats = model.moe_offload.stats()
    assert (stats.events, stats.by_device, stats.by_host) == (60, 38, 22)
    assert (stats - stats).by_host == 0
    model.moe_offload.close()
    assert "the device decides in 2 of 3 layers" in str(model.moe_offload)


def test_one_line_says_which_layers_are_the_hosts_and_why(caplog):
    with caplog.at_level(logging.INFO, "moe_offload"):
        assert on_device(DEVICE, [BANK] * 3, [4] * 3, ["host", "disk", "host"], "cpu") == [True, False, True]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "of 1 of 3 layers" in record.getMessage() and "rest on disk" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.INFO, "moe_offload"):
        assert on_device(OffloadConfig(), [BANK] * 2, [4] * 2, ["host", "disk"], "cuda:0") == [True, False]
    (record,) = caplog.records
    assert record.levelname == "INFO", "nobody asked for it"


def test_all_layers_on_disk_are_the_hosts():
    model = mixed(on_disk=(0, 1), layers=2)
    assert torch.equal(say(model), say(resident(layers=2)))
    assert model.moe_offload.stats().by_device == 0 and model.moe_offload._runtime.device_caches is None
    model.moe_offload.close()


def test_each_layer_has_the_policy_of_who_decides():
    model = mixed(settings=replace(SETTINGS, decide="device"))
    policies = [type(layer.cache.policy).__name__ for layer in model.moe_offload._runtime.layers]
    assert policies == ["DecayedLFU", "Successors", "DecayedLFU"]
    assert torch.equal(say(model), say(resident(layers=3)))
    model.moe_offload.close()


@pytest.mark.parametrize("on_disk", [(), (1,)])
def test_only_a_graph_without_the_host_is_one_to_record(on_disk, monkeypatch):
    graphs = []
    monkeypatch.setattr(compiling, "run_graph", lambda gm, inputs: graphs.append(gm) or gm.forward)
    model = mixed(on_disk=on_disk, layers=2)
    say(model, n=3)
    decode = [gm.graph for gm in graphs if any(node.target is ops.place for node in gm.graph.nodes)]
    assert decode and all(compiling._needs_host(graph) == bool(on_disk) for graph in decode)
    prefill = [gm.graph for gm in graphs if any(node.target is ops.stream for node in gm.graph.nodes)]
    assert prefill and all(compiling._needs_host(graph) for graph in prefill)
    model.moe_offload.close()


def test_a_graph_that_dynamo_shares_serves_a_layer_of_the_host():
    model = mixed(layers=2)
    say(model, n=3)
    host, cache = (layer := model.moe_offload._runtime.layers[1]), model.moe_offload._runtime.layers[1].cache
    assert host.device_cache is None
    ids = torch.tensor([5, 2])
    slots = ops.place(ids, layer.slots.bank_SN)
    assert slots.tolist() == [cache.slot_of[5], cache.slot_of[2]] and min(slots) >= 0
    model.moe_offload.close()


# A layer whose experts all have slots needs no rows: the host loads what is missing, and the device has nothing to do.


def test_where_every_expert_has_a_slot_the_device_decides_whatever_the_rows_rest_in(monkeypatch):
    model = mixed(on_disk=(0, 1), layers=2, residency=1.0)
    want = say(resident(layers=2))
    assert torch.equal(say(model), want)
    stats = model.moe_offload.stats()
    assert stats.by_device == 38 and [layer.resident for layer in stats.layers] == [8, 8]
    cache = model.moe_offload._runtime.device_caches.caches[1]
    known = cache.kernels.decide
    cache.kernels = cache.kernels._replace(decide=raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        say(model)
    cache.kernels = cache.kernels._replace(decide=known)
    assert torch.equal(say(model), want)
    assert model.moe_offload.stats().misses == stats.misses, "nothing was read again"
    model.moe_offload.close()


def test_a_row_that_cannot_be_loaded_leaves_the_host_in_charge(monkeypatch):
    model = mixed(on_disk=(0,), layers=1, residency=1.0)
    ids = IDS[:, :2]  # a prompt that leaves experts out
    with monkeypatch.context() as patched:
        arrivals = model.moe_offload._runtime.layers[0].arrivals
        start_prewarm = arrivals.start_prewarm

        def failing(expert):
            patched.setattr(arrivals.store, "begin", raising(ExpertReadError("gone")))
            return start_prewarm(expert)

        patched.setattr(arrivals, "start_prewarm", failing)
        with pytest.raises(ExpertReadError, match="gone"):
            say(model, ids)
        assert not model.moe_offload._runtime.device_caches.in_charge
    assert torch.equal(say(model, ids), say(resident(), ids))
    model.moe_offload.close()


def raising(error):
    def call(*_):
        raise error

    return call


# Ids that are no expert's: at once where the host decides, after the forward where the device does.


def broken_router(model, monkeypatch, index):
    """From the next decode step on, layer `index` is asked for an expert that does not exist."""
    layer = model.moe_offload._runtime.layers[index]
    verb = "fetch" if layer.device_cache is None else "place"
    known = getattr(layer, verb)
    monkeypatch.setattr(layer, verb, lambda ids_P: known(torch.full_like(ids_P, 10**6)))


def watched(model, monkeypatch, index):
    """How often layer `index` has been asked while decoding."""
    asked, layer = [], model.moe_offload._runtime.layers[index]
    verb = "fetch" if layer.device_cache is None else "place"
    known = getattr(layer, verb)
    monkeypatch.setattr(layer, verb, lambda ids_P: asked.append(ids_P) or known(ids_P))
    return asked


@pytest.mark.parametrize(("index", "says"), [(0, r"layers\.0.*asked 2 times"), (1, r"layers\.1.*for expert 1000000")])
def test_an_expert_that_does_not_exist_is_an_error(index, says, monkeypatch):
    model = mixed()
    want = say(model)
    with monkeypatch.context() as patched:
        broken_router(model, patched, index)
        after = watched(model, patched, 2)
        with pytest.raises(RoutingError, match=says):
            say(model)
        assert len(after) == (1 if index == 0 else 0), "masked on the device, and reported at the end of the forward"
    assert torch.equal(say(model), want), "the next call works"
    model.moe_offload.close()


def test_what_began_on_the_device_is_reported_there(monkeypatch):
    """A layer of the host that is asked for nonsense may only have followed one of the device."""
    model = mixed()
    want = say(model)
    with monkeypatch.context() as patched:
        broken_router(model, patched, 0)
        broken_router(model, patched, 1)
        with pytest.raises(RoutingError, match=r"layers\.0.*asked 2 times"):
            say(model)
    assert torch.equal(say(model), want), "and not reported again"
    model.moe_offload.close()


# Memory that the system lets a GPU read by itself, or does not.


class Cudart:
    """Registers `most` pieces of memory and no more."""

    def __init__(self, most):
        self.most, self.registered = most, []

    def cudaHostRegister(self, address, nbytes, flags):
        if len(self.registered) == self.most:
            return 2
        self.registered.append(address)
        return 0

    def cudaHostUnregister(self, address):
        if address not in self.registered:
            return 1
        self.registered.remove(address)
        return 0

    def cudaGetErrorString(self, code):
        return "out of memory"


@pytest.fixture
def cudart(monkeypatch):
    made = Cudart(most=2)
    monkeypatch.setattr("torch.cuda.cudart", lambda: made)
    monkeypatch.setattr("torch.cuda.device", lambda device: torch.no_grad())
    monkeypatch.setattr(pinned, "clear_last_error", lambda: None)
    monkeypatch.setattr(pinned, "device_address", lambda address: address)
    return made


def test_layers_are_pinned_as_far_as_the_system_allows(cudart, caplog):
    rows = {i: torch.zeros(2, 4096, dtype=torch.uint8) for i in (0, 2, 5)}
    assert pinned.pin_layers(rows, "cuda:0") == {0, 2}
    (record,) = caplog.records
    assert "2 of 3 layers in RAM (out of memory)" in record.getMessage()
    pinned.unpin_layers(rows, "cuda:0")
    assert cudart.registered == []


def test_a_layer_that_could_not_be_pinned_is_the_hosts(monkeypatch):
    """As on a GPU: a CPU needs nothing pinned."""
    import moe_offload.runtime.assemble as assemble

    held = HostStore([torch.zeros(8, 4096, dtype=torch.uint8)] * 3, pinned={0, 2})
    monkeypatch.setattr(pinned, "device_view", lambda rows, device: rows)
    moe_layers = find_experts(build(QWEN, num_hidden_layers=3))
    found = assemble.readable_rows(moe_layers, [4] * 3, [held] * 3, [True, True, True], "cuda:0")
    assert sorted(found) == [0, 2]
    assert sorted(assemble.readable_rows(moe_layers, [4] * 3, [held] * 3, [True, True, False], "cpu")) == [0, 1]
    assert assemble.readable_rows(moe_layers, [8] * 3, [held] * 3, [False, True, False], "cuda:0") == {1: None}
