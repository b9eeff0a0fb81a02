"""Look-ahead where the device decides: the guess becomes an op that no host waits for, after this layer's own rows have
been asked for and before the next layer decides."""

from __future__ import annotations

import pytest
import torch

import passes
from passes import ops

from .conftest import K, hidden
from .test_lookahead import Layers, prefetches, traced_layers

BOTH = ("layer 0", "layer 1")


def rewritten(implementation="batched_mm", on_device=BOTH, too_small=()):
    """The traced layers once the guess is in the graph and slots are renamed; and what they are bound to."""
    model, x = Layers(implementation), hidden(2)
    with torch.no_grad():
        early = model.router_says(1, x + model.mixes[0](x))
        want = model(x)
    traced, guesses = traced_layers(model, x)
    sites = traced.sites()
    banks = {f"layer {i}": one.layer.bank for i, one in enumerate(guesses)}
    for name in too_small:
        banks[name] = passes.Bank(banks[name].fields, 2 * K - 1, banks[name].dtype)
    passes.insert_prefetch(traced.gm.graph, sites=sites)
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks=banks, on_device=on_device)
    return traced, guesses, sites, early, want


def nodes_of(traced, op):
    return [node for node in traced.gm.graph.nodes if node.target is op]


def test_the_guess_is_loaded_after_this_layer_s_rows_and_before_the_next_one_s(implementation):
    traced, guesses, sites, early, want = rewritten(implementation)
    assert passes.load_ahead(traced.gm.graph, sites=sites, on_device=BOTH) == sites[1:]
    traced.gm.graph.lint()
    (ahead,), (first, second) = nodes_of(traced, ops.place_ahead), nodes_of(traced, ops.place)
    order = list(traced.gm.graph.nodes)
    assert order.index(first) < order.index(ahead) < order.index(second)
    assert all(order.index(ahead) < order.index(read.node) for read in sites[0].reads if read.node in order)
    assert ahead.args[1:] == (first, sites[1].bank) and prefetches(traced.gm.graph) == []
    assert list(first.users) == [ahead], "nothing reads the slots before the guess has been launched"
    for one in guesses:
        ops.bind(one.layer.bank_SN, one)
    served = {site.bank: one.layer.bank_SN for site, one in zip(sites, guesses, strict=True)}
    assert torch.equal(traced.run(served), want)
    assert [one.told for one in guesses] == [[], [early]]


def test_it_stays_where_it_is_when_topk_is_joined(monkeypatch):
    monkeypatch.setattr(passes.top, "DTYPES", {torch.float32, torch.float64})
    traced, _, sites, *_ = rewritten()
    passes.load_ahead(traced.gm.graph, sites=sites, on_device=BOTH)
    passes.choose_with_slots(traced.gm.graph, sites=sites, by_scores=dict.fromkeys(BOTH, K))
    traced.gm.graph.lint()
    (ahead,), (first, second) = nodes_of(traced, ops.place_ahead), nodes_of(traced, ops.place_top)
    order = list(traced.gm.graph.nodes)
    assert order.index(first) < order.index(ahead) < order.index(second)
    assert ahead.args[1].args == (first, 2), "the slots, which are its third result"
    assert list(ahead.args[1].users) == [ahead]


@pytest.mark.parametrize("on_device", [BOTH[:1], BOTH[1:]])
def test_no_guess_goes_from_the_host_to_the_device_or_back(on_device):
    traced, _, sites, *_ = rewritten(on_device=on_device)
    assert passes.load_ahead(traced.gm.graph, sites=sites, on_device=on_device) == []
    assert not prefetches(traced.gm.graph) and not nodes_of(traced, ops.place_ahead)


@pytest.mark.parametrize("options", [{"on_device": ()}, {"too_small": BOTH[1:]}])
def test_a_graph_of_the_host_keeps_its_guesses(options):
    traced, _, sites, *_ = rewritten(**options)
    before = str(traced.gm.graph)
    assert passes.load_ahead(traced.gm.graph, sites=sites, on_device=BOTH) == []
    assert str(traced.gm.graph) == before and len(prefetches(traced.gm.graph)) == 1


def test_a_bank_that_two_sites_share_gets_no_guess():
    """Rows that are staged for the one would be taken for the other's."""
    traced, _, sites, *_ = rewritten()
    again = passes.Site(sites[1].layer, sites[1].num_experts, sites[1].ids, sites[1].weights, sites[1].reads)
    assert passes.load_ahead(traced.gm.graph, sites=[*sites, again], on_device=BOTH) == []
    assert not prefetches(traced.gm.graph)
