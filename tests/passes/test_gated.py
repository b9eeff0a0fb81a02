"""A gate as part of the product: the same result, and other gates left alone."""

from __future__ import annotations

import pytest
import torch

import passes
from passes import ops
from tests.fakes.traced_block import permuted, trace

from .conftest import K, hidden, make_block


def gated(kind, implementation="grouped_mm", pairs=K):
    traced = trace(make_block(kind, implementation, torch.float64), hidden(1, torch.float64))
    layer, sites = permuted(traced.params), traced.sites()
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    done = passes.gate_in_products(traced.gm.graph, sites=sites, few_pairs={"layer": pairs})
    traced.gm.graph.lint()
    ours = [node for node in traced.gm.graph.nodes if node.target is ops.gated_mm]
    return done, ours, traced.run({sites[0].bank: layer.bank_SN})


@pytest.mark.parametrize(
    ("kind", "joined"), [("plain", 1), ("transposed", 1), ("biased", 0), ("ungated", 0), ("normed", 1)]
)
def test_the_result_is_the_same(kind, joined):
    """biased: gate and up lie column by column, and are clamped."""
    want = trace(make_block(kind, "grouped_mm", torch.float64), hidden(1, torch.float64)).run()
    done, ours, got = gated(kind)
    assert torch.equal(got, want)
    assert (len(done), len(ours)) == (joined, joined)


def test_more_pairs_and_other_products_are_left_alone():
    assert gated("plain", pairs=K - 1)[:2] == ([], [])
    assert gated("plain", "batched_mm")[:2] == ([], [])


def test_halves_that_are_used_otherwise_are_left_alone():
    traced = trace(make_block("plain", "grouped_mm", torch.float64), hidden(1, torch.float64))
    layer, sites = permuted(traced.params), traced.sites()
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    product = next(node for node in traced.gm.graph.nodes if node.target is ops.grouped_mm)
    with traced.gm.graph.inserting_after(product):
        traced.gm.graph.call_function(torch.abs, (product,))
    assert passes.gate_in_products(traced.gm.graph, sites=sites, few_pairs={"layer": K}) == []
