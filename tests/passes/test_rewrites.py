"""Each pass against the unmodified graph: bit-equal with every expert in its own slot, in a random slot, in waves."""

from __future__ import annotations

import pytest
import torch

import passes
from passes import ops

from .conftest import E, K, hidden, make_block
from .fakes import FakeCounter, identity, permuted, trace

LAYERS = [identity, permuted]


@pytest.mark.parametrize("make_layer", LAYERS)
def test_slots_equal_the_unmodified_graph(block, dtype, make_layer):
    traced = trace(block, hidden(3, dtype))
    want = traced.run()
    layer = make_layer(traced.params)
    sites = traced.sites()
    done = passes.slots(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    assert done == sites and len(sites) == 1
    assert torch.equal(traced.run({sites[0].bank: layer.bank_SN}), want)
    assert [call.split()[0] for call in layer.calls] == ["fetch", "wait"]


@pytest.mark.parametrize("wave", [0, 1, 3])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_waves_equal_the_unmodified_graph(block, dtype, wave, dynamic):
    traced = trace(block, hidden(7, dtype), dynamic)
    want = traced.run()
    layer = permuted(traced.params, wave=wave)
    sites = traced.sites()
    assert passes.waves(traced.gm.graph, sites=sites, banks={"layer": layer.bank}) == sites
    got = traced.run({sites[0].bank: layer.bank_SN})
    assert torch.equal(got, want)
    assert len(layer.calls) == 1 and layer.calls[0].startswith("stream")


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("wave", [1, 3])
def test_a_wave_runs_alone_where_pairs_fill_vectors(kind, implementation, dtype, tokens, wave):
    """Sizes as in real models: no elementwise kernel meets an end of a tensor that does not fill a vector."""
    traced = trace(make_block(kind, implementation, dtype, (128, 192)), hidden(tokens, dtype, 128))
    want = traced.run()
    layer = permuted(traced.params, wave=wave)
    sites = traced.sites()
    passes.waves(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    stream = next(node for node in traced.gm.graph.nodes if node.target is ops.stream)
    assert ops._CORES[stream.args[4]].pairs_independent == (kind != "normed"), "a norm's mean is one number a pair"
    assert torch.equal(traced.run({sites[0].bank: layer.bank_SN}), want)


def test_waves_leave_only_routing_and_weighting(block, dtype):
    """What needs expert weights is gone from the graph, the histogram with it; what does not is still there."""
    traced = trace(block, hidden(7, dtype))
    sites = traced.sites()
    layer = identity(traced.params)
    passes.waves(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    counts = passes.inspect.op_counts(traced.gm.graph)
    assert counts["stream"] == 1 and counts["topk"] == 1 and counts["sum"] == 1
    assert not {"bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", "histc", "cumsum"} & set(counts)
    for weight in list(sites[0].weights.values())[1:]:
        assert not weight.users


def test_slots_leave_alone_what_does_not_fit(implementation):
    traced = trace(make_block("plain", implementation), hidden(3))
    before = passes.inspect.text(traced.gm.graph)
    bank = identity(traced.params).bank
    small = passes.Bank(bank.fields, 3 * K - 1, bank.dtype)
    assert passes.slots(traced.gm.graph, sites=traced.sites(), banks={"layer": small}) == []
    assert passes.inspect.text(traced.gm.graph) == before


def test_slots_leave_alone_an_unknown_number_of_tokens(implementation):
    traced = trace(make_block("plain", implementation), hidden(3), dynamic=True)
    assert traced.sites()[0].pairs is None
    banks = {"layer": identity(traced.params).bank}
    assert passes.slots(traced.gm.graph, sites=traced.sites(), banks=banks) == []


def test_waves_leave_alone_what_slots_renamed(implementation):
    traced = trace(make_block("biased", implementation), hidden(3))
    sites, banks = traced.sites(), {"layer": identity(traced.params).bank}
    guards, slots, waves = passes.run(traced.gm.graph, passes.offload_pipeline(sites, banks))
    assert slots.sites == sites and "+1 fetch" in slots.change
    assert guards.sites == waves.sites == [] and guards.change == waves.change == "left alone"


def test_observe_counts_every_pair_and_changes_nothing(block, dtype):
    traced = trace(block, hidden(5, dtype))
    want = traced.run()
    counter = FakeCounter()
    for param in traced.params.values():
        ops.bind(param, counter)
    passes.run(traced.gm.graph, passes.observe_pipeline(traced.sites()))
    assert torch.equal(traced.run(), want)
    scores = hidden(5, dtype) @ block.router.t()
    assert sorted(counter.seen) == sorted(scores.topk(K).indices.flatten().tolist())


def test_observe_leaves_alone_what_a_bank_serves(implementation):
    traced = trace(make_block("plain", implementation), hidden(3))
    sites, banks = traced.sites(), {"layer": identity(traced.params).bank}
    passes.slots(traced.gm.graph, sites=sites, banks=banks)
    assert passes.instrument(traced.gm.graph, sites=sites) == []


def test_rewritten_graphs_survive_inductor(implementation):
    """The ops keep their place and none is dropped when Inductor compiles what the passes made."""
    block, x = make_block("biased", implementation), hidden(2)
    calls: list[str] = []

    def backend(gm, inputs):
        from torch._inductor.compile_fx import compile_fx

        by_id = {id(p): n for n, p in block.experts.named_parameters(recurse=False)}
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
        weights = {
            n: passes.Weight("layer", by_id[id(v)], E) for n, v in zip(nodes, inputs, strict=True) if id(v) in by_id
        }
        layer = permuted({by_id[id(v)]: v for v in inputs if id(v) in by_id})
        layer.calls = calls
        sites = passes.find_sites(gm.graph, weights)
        passes.run(gm.graph, passes.offload_pipeline(sites, {"layer": layer.bank}))
        at = nodes.index(sites[0].bank)
        mode = torch._guards.TracingContext.get().fake_mode
        sites[0].bank.meta["example_value"] = mode.from_tensor(layer.bank_SN, static_shapes=True)
        gm.recompile()
        run = compile_fx(gm, [layer.bank_SN if i == at else v for i, v in enumerate(inputs)])
        return lambda *args: run(*[layer.bank_SN if i == at else v for i, v in enumerate(args)])

    torch._dynamo.reset()
    with torch.no_grad():
        want = torch.compile(block, backend="inductor", fullgraph=True)(x)
        torch._dynamo.reset()
        got = torch.compile(block, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert [c.split()[0] for c in calls] == ["fetch", "wait"]
