"""topk and the decision in one op: the same experts, and other code left alone."""

from __future__ import annotations

import pytest
import torch

import passes
from passes import ops
from tests.fakes.traced_block import permuted, trace

from .conftest import K, hidden, make_block


def renamed(change=None, implementation="grouped_mm", device=("layer",)):
    block = make_block("plain", implementation, torch.float64)
    block.route = change or torch.topk
    traced = trace(block, hidden(3, torch.float64))
    layer = permuted(traced.params)
    sites = traced.sites()
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks={"layer": layer.bank}, on_device=device)
    return traced, layer, sites


def of(traced, op):
    return [node for node in traced.gm.graph.nodes if node.target is op]


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    monkeypatch.setattr(passes.top, "DTYPES", {torch.float64})  # in which the fake computes exactly


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_result_is_the_same_and_topk_is_gone(implementation):
    want = trace(make_block("plain", implementation, torch.float64), hidden(3, torch.float64)).run()
    traced, layer, sites = renamed(implementation=implementation)
    assert passes.choose_with_slots(traced.gm.graph, sites=sites, by_scores={"layer": K}) == sites
    traced.gm.graph.lint()
    assert torch.equal(traced.run({sites[0].bank: layer.bank_SN}), want)
    assert not of(traced, torch.topk) and not of(traced, ops.place)
    (joined,) = of(traced, ops.place_top)
    assert ops.pairs_of(joined) == 3 * K and [call.split()[0] for call in layer.calls] == ["place_top"]


def smallest(scores, k):
    return torch.topk(scores, k, largest=False)


def unsorted(scores, k):
    return torch.topk(scores, k, sorted=False)


def along_tokens(scores, k):
    values, ids = torch.topk(scores.t(), k, dim=0)
    return values.t(), ids.t()


def others(scores, k):
    values, ids = torch.topk(scores, k)
    return values, (ids + 1) % scores.shape[1]


def written(scores, k):
    values, ids = torch.topk(scores, k)
    ids[:, 0] = 0
    return values, ids


def of_some(scores, k):
    return torch.topk(scores[:, :-1], k)


@pytest.mark.parametrize("change", [smallest, unsorted, along_tokens, others, written, of_some])
def test_another_choice_is_left_alone(change):
    traced, _, sites = renamed(change)
    before = str(traced.gm.graph)
    assert passes.choose_with_slots(traced.gm.graph, sites=sites, by_scores={"layer": K}) == []
    assert str(traced.gm.graph) == before


def test_and_so_is_a_layer_that_is_not_named_or_whose_host_decides():
    for by_scores, device in (({}, ("layer",)), ({"layer": K + 1}, ("layer",)), ({"layer": K}, ())):
        traced, _, sites = renamed(device=device)
        assert passes.choose_with_slots(traced.gm.graph, sites=sites, by_scores=by_scores) == []


def test_scores_of_another_dtype_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(passes.top, "DTYPES", {torch.float32})
    traced, _, sites = renamed()
    assert passes.choose_with_slots(traced.gm.graph, sites=sites, by_scores={"layer": K}) == []
