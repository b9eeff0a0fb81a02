"""A decode step without its sort: the same results, and nothing of the sort is left."""

from __future__ import annotations

import operator

import pytest
import torch

import passes
from tests.fakes.traced_block import permuted, trace

from .conftest import K, hidden, make_block

SORTS = {"sort", "floordiv", "empty_like", "arange", "setitem"}


def renamed(block, tokens, pairs):
    """The rewritten graph, its report, and a function that runs it."""
    traced = trace(block, hidden(tokens, torch.float64))
    layer = permuted(traced.params)
    sites = traced.sites()
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    done = passes.leave_unsorted(traced.gm.graph, sites=sites, few_pairs={"layer": pairs})
    traced.gm.graph.lint()
    return traced, done, lambda: traced.run({sites[0].bank: layer.bank_SN})


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_result_is_the_same_and_no_sort_is_left(kind, tokens):
    block = make_block(kind, "grouped_mm", torch.float64)
    want = trace(block, hidden(tokens, torch.float64)).run()
    traced, done, run = renamed(block, tokens, pairs=tokens * K)
    assert len(done) == 1
    torch.testing.assert_close(run(), want, rtol=1e-12, atol=1e-12)
    left = set(passes.inspect.op_counts(traced.gm.graph)) & SORTS
    assert left <= ({"floordiv", "arange"} if tokens > 1 else set()), "x[arange // K] of several tokens"


def test_one_tokens_pairs_are_a_view_of_it():
    traced, _, _ = renamed(make_block("plain", "grouped_mm", torch.float64), 1, pairs=K)
    (expand,) = [node for node in traced.gm.graph.nodes if node.target == "expand"]
    assert expand.meta["example_value"].stride() == (0, 1)


def test_more_pairs_stay_sorted_and_so_does_code_that_does_not_sort():
    for implementation, pairs in (("grouped_mm", 3 * K - 1), ("batched_mm", 3 * K)):
        block = make_block("plain", implementation, torch.float64)
        traced, done, _ = renamed(block, 3, pairs)
        assert done == [] and ("sort" in passes.inspect.op_counts(traced.gm.graph)) == (implementation == "grouped_mm")


def test_another_use_of_the_sorted_ids_keeps_the_sort():
    traced = trace(make_block("plain", "grouped_mm", torch.float64), hidden(3, torch.float64))
    layer, sites = permuted(traced.params), traced.sites()
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    ids = sites[0].reader_ids
    with traced.gm.graph.inserting_after(ids):
        traced.gm.graph.call_function(torch.diff, (ids,))
    assert passes.leave_unsorted(traced.gm.graph, sites=sites, few_pairs={"layer": 3 * K}) == []


def test_what_is_written_into_stays_a_copy():
    """`x[perm // K]` is memory of its own, and a view of x is not."""
    traced = trace(make_block("plain", "grouped_mm", torch.float64), hidden(1, torch.float64))
    layer, sites = permuted(traced.params), traced.sites()
    graph = traced.gm.graph
    (read,) = [
        node
        for node in graph.nodes
        if node.target is operator.getitem and getattr(node.args[1], "target", None) is operator.floordiv
    ]
    with graph.inserting_after(read):
        graph.call_method("mul_", (read, 1))
    passes.rename_to_slots(graph, sites=sites, banks={"layer": layer.bank})
    passes.leave_unsorted(graph, sites=sites, few_pairs={"layer": K})
    assert read in list(graph.nodes) and not [node for node in graph.nodes if node.target == "expand"]
    graph.lint()
