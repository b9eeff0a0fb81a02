"""What a pass has orphaned goes, and nothing else: least of all a call that is there for its effect."""

from __future__ import annotations

import torch
from torch.fx import Graph

from passes.erase import erase_orphans


def counted(graph: Graph):
    ids = graph.placeholder("ids")
    counts = graph.call_function(torch.histc, (graph.call_method("float", (ids,)),))
    return ids, counts, graph.call_function(torch.cumsum, (counts, 0))


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op.startswith("call")]


def test_an_orphan_goes_with_what_fed_only_it():
    graph = Graph()
    ids, _, offsets = counted(graph)
    graph.output(ids)
    erase_orphans(graph, [offsets])
    assert names(graph) == []


def test_what_somebody_else_uses_stays():
    graph = Graph()
    _, counts, offsets = counted(graph)
    graph.output(counts)
    erase_orphans(graph, [offsets])
    assert names(graph) == ["float_1", "histc"]


def test_an_effect_without_a_user_stays():
    """The writes to a static KV cache have no users."""
    graph = Graph()
    cache = graph.placeholder("cache")
    write = graph.call_method("index_copy_", (cache, 0, cache, cache))
    graph.output(cache)
    erase_orphans(graph, [write])
    assert names(graph) == ["index_copy_"]


def test_what_a_caller_says_is_pure_goes_too():
    graph = Graph()
    x = graph.placeholder("x")
    view = graph.call_method("reshape", (x, -1))
    graph.output(x)
    erase_orphans(graph, [view])
    assert names(graph) == ["reshape"]
    erase_orphans(graph, [view], also=[view])
    assert names(graph) == []
