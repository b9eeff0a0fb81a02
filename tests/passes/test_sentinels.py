"""The guards of expert parallelism: what transformers up to 5.20 puts into every layer, and later ones only there."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph

import moe_offload
import passes
from moe_offload import RoutingError
from moe_offload.apps.families.tiny import build
from moe_offload.experts import is_experts
from tests.fakes.offloaded import QWEN, offload, resident, say

E = 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def guarded(model):
    """As if transformers were 5.17; and a count of what the guards do to the graph."""
    for module in filter(is_experts, model.modules()):
        module._is_expert_parallel = True
    return model


@pytest.mark.parametrize("overlap", [True, False])
def test_a_guarded_model_says_the_same(overlap):
    want = say(guarded(resident(layers=2)))
    settings = moe_offload.OffloadConfig(
        experts_implementation="grouped_mm", compile="graph", poison=True, kv_tokens=64, wave_rows=1, overlap=overlap
    )
    model = guarded(offload(build(QWEN, num_hidden_layers=2), 0.5, config=settings))
    assert torch.equal(say(model), want)
    by_name = [{report.name: report.layers for report in graph} for graph in model.moe_offload.graphs]
    assert by_name and all(len(reports["drop_sentinels"]) == 1 for reports in by_name), (
        "a graph holds one layer's experts"
    )
    model.moe_offload.close()


def test_an_id_that_is_not_mine_is_refused_not_clamped(monkeypatch):
    """Without the guards it would be the last expert's: it must be an error."""
    model = guarded(offload(build(QWEN, num_hidden_layers=1)))
    router = type(model.model.layers[0].mlp.gate)
    route = router.forward

    def elsewhere(self, *args):
        *rest, ids = route(self, *args)
        return *rest, torch.full_like(ids, self.num_experts)

    monkeypatch.setattr(router, "forward", elsewhere)
    with pytest.raises(RoutingError, match="asked for expert 8"):
        say(model)
    model.moe_offload.close()


# The pass by itself.


def guarded_graph(threshold, clamp=True):
    """What transformers up to 5.20 traces to: (graph, ids, weight)."""
    graph = Graph()
    x, ids, weight = (graph.placeholder(name) for name in ("x", "ids", "weight"))
    both = graph.call_function(torch.sort, (ids,))
    sorted_ids = graph.call_function(operator.getitem, (both, 0))
    mask = graph.call_method("unsqueeze", (graph.call_function(operator.ge, (sorted_ids, threshold)), -1))
    if clamp:
        graph.call_method("clamp_", (sorted_ids,), {"max": E - 1})
    x = graph.call_method("masked_fill_", (x, mask, 0.0))
    counts = graph.call_function(torch.histc, (sorted_ids,), {"bins": E, "min": 0, "max": E - 1})
    offsets = graph.call_function(torch.cumsum, (counts,), {"dim": 0})
    y = graph.call_function(torch.nn.functional.grouped_mm, (x, weight), {"offs": offsets})
    graph.output(graph.call_method("masked_fill", (y, mask, 0.0)))
    return graph, passes.find_sites(graph, {weight: passes.Weight("layer", "weight", E)})


@pytest.mark.parametrize("clamp", [True, False])
def test_masks_and_clamps_go_and_the_product_stays(clamp):
    graph, sites = guarded_graph(E, clamp)
    assert passes.sentinels.drop_sentinels(graph, sites=sites) == sites
    graph.lint()
    counts = passes.inspect.op_counts(graph)
    assert set(counts) == {"sort", "getitem", "histc", "cumsum", "grouped_mm"}
    assert sites[0].reads[0].node.args[0].name == "x"


def test_a_mask_of_another_bound_is_the_model_s_own():
    graph, sites = guarded_graph(E - 1)
    before = str(graph)
    assert passes.sentinels.drop_sentinels(graph, sites=sites) == []
    assert str(graph) == before
