"""Prefill: one `stream` op in place of the experts code, bit-equal however the experts are put into waves."""

from __future__ import annotations

import operator

import pytest
import torch

import passes
from passes import ops
from tests.fakes.traced_block import identity, permuted, trace

from .conftest import hidden, make_block


@pytest.mark.parametrize("wave", [0, 1, 3])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_waves_equal_the_unmodified_graph(block, dtype, wave, dynamic):
    traced = trace(block, hidden(7, dtype), dynamic)
    want = traced.run()
    layer = permuted(traced.params, wave=wave)
    sites = traced.sites()
    assert passes.stream_in_waves(traced.gm.graph, sites=sites, banks={"layer": layer.bank}) == sites
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
    passes.stream_in_waves(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    stream = next(node for node in traced.gm.graph.nodes if node.target is ops.stream)
    assert ops._CORES[stream.args[4]].pairs_independent == (kind != "normed"), "a norm's mean is one number a pair"
    assert torch.equal(traced.run({sites[0].bank: layer.bank_SN}), want)


def test_a_number_computed_in_the_graph_is_a_constant_of_the_core():
    """Dynamo leaves `-limit` of a clamp in the graph: the core goes through it."""
    traced = trace(make_block("plain"), hidden(7))
    want = traced.run()
    (site,), graph = traced.sites(), traced.gm.graph
    product = next(iter(site.reads[0].node.users))
    with graph.inserting_after(product):
        limit = graph.call_function(operator.neg, (-1e30,))
    with graph.inserting_after(limit):
        clamped = graph.call_method("clamp", (product,), {"max": limit})
    clamped.meta = dict(product.meta)
    product.replace_all_uses_with(clamped, delete_user_cb=lambda user: user is not clamped)
    layer = permuted(traced.params, wave=1)
    passes.stream_in_waves(graph, sites=[site], banks={"layer": layer.bank})
    assert torch.equal(traced.run({site.bank: layer.bank_SN}), want)


def test_waves_leave_only_routing_and_weighting(block, dtype):
    """What needs expert weights is gone from the graph, the histogram with it; what does not is still there."""
    traced = trace(block, hidden(7, dtype))
    sites = traced.sites()
    layer = identity(traced.params)
    passes.stream_in_waves(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    counts = passes.inspect.op_counts(traced.gm.graph)
    assert counts["stream"] == 1 and counts["topk"] == 1 and counts["sum"] == 1
    assert not {"bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", "histc", "cumsum"} & set(counts)
    for weight in list(sites[0].weights.values())[1:]:
        assert not weight.users


def insert_after(node, make):
    """What `make` adds to the graph after `node` takes the place of `node`."""
    with node.graph.inserting_after(node):
        added = make(node)
    added.meta = dict(node.meta)
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def test_code_that_fixes_the_number_of_pairs_is_refused():
    """A wave has fewer pairs than the graph was traced with."""
    traced = trace(make_block("plain"), hidden(7))
    (site,), graph = traced.sites(), traced.gm.graph
    product = next(iter(site.reads[0].node.users))
    insert_after(product, lambda node: graph.call_method("view", (node, *node.meta["example_value"].shape)))
    with pytest.raises(passes.UnknownUse, match=r"view.*14, 48, 1.* each token by itself"):
        passes.stream_in_waves(graph, sites=[site], banks={"layer": identity(traced.params).bank})


@pytest.mark.parametrize(
    "repeated", [True, False], ids=["repeated for each pair", "a parameter with an entry for each"]
)
def test_a_constant_in_place_of_the_activations_is_refused(repeated):
    """It has an entry for each pair of the traced call, whoever made it: a wave has fewer."""
    traced = trace(make_block("plain"), hidden(7))
    (site,), graph = traced.sites(), traced.gm.graph
    product = next(user for user in site.reads[1].node.users if passes.find.name_of(user) == "bmm")
    (activations,) = (i for i in product.all_input_nodes if i is not site.reads[1].node)
    value = torch.ones(activations.meta["example_value"].shape)
    with graph.inserting_before(next(iter(graph.nodes))):
        constant = graph.placeholder("constant")
    constant.meta["example_value"] = torch.nn.Parameter(value[:1] if repeated else value)
    if repeated:
        with graph.inserting_before(product):
            constant = graph.call_method("expand", (constant, *value.shape))
        constant.meta["example_value"] = value
    product.replace_input_with(activations, constant)
    with pytest.raises(passes.UnknownUse, match=r"bmm.*constant|bmm.*expand"):
        passes.stream_in_waves(graph, sites=[site], banks={"layer": identity(traced.params).bank})
