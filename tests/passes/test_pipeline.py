"""The passes in their order: each leaves alone what another has served, and Inductor keeps what they made."""

from __future__ import annotations

import torch

import passes
from tests.fakes.traced_block import identity, permuted, trace

from .conftest import E, hidden, make_block


def test_waves_leave_alone_what_slots_renamed(implementation):
    traced = trace(make_block("biased", implementation), hidden(3))
    sites, banks = traced.sites(), {"layer": identity(traced.params).bank}
    guards, slots, waves = passes.run_passes(traced.gm.graph, passes.offload_pipeline(sites, banks))
    assert slots.layers == [site.layer for site in sites] and "+1 fetch" in slots.change
    assert guards.layers == waves.layers == [] and guards.change == waves.change == "left alone"


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
        passes.run_passes(gm.graph, passes.offload_pipeline(sites, {"layer": layer.bank}))
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
