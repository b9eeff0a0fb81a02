"""Decode: ask the next layer's router early, so that its experts load while this layer computes.

    before   h1 = ...;  ids1 = route1(norm1(h1));                   y1 = bmm(W1[ids1], ...);  o1 = h1 + y1
             h2 = o1 + attention(o1);  ids2 = route2(norm2(h2));    y2 = bmm(W2[ids2], ...);  o2 = h2 + y2
    after    h1 = ...;  moe_offload.prefetch(route2(norm2(h1)), bank2)
             ids1 = route1(norm1(h1));                              the rest as it was

What a router reads is found by dependence: going up from the ids, the first node through which all of them pass and to
which the layer's own result is added again. That is the residual stream `h`, and what lies between is the *stem*, here
`route(norm(.))`. The residual stream changes little from one layer to the next, so the stem of the next layer, applied
to this layer's `h`, names most of the experts that the next layer will ask for.

The guess goes to `prefetch` and nowhere else: no result of the model depends on it. A layer whose stem is not of this
form, or has an effect besides its result, gets no guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import ops
from .core_graph import find_constants
from .find import name_of
from .sites import Site

FRESH = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "clone")
STEM_NODES = 200  # at most so many nodes count as a router (a few dozen are usual); beyond it no guess is made


@dataclass(frozen=True)
class Stem:
    """From the residual stream to the ids of one site: `nodes` in running order, `fixed` ones among them."""

    site: Site
    residual: Node
    nodes: tuple[Node, ...]


def insert_prefetch(graph: Graph, *, sites: Sequence[Site]) -> list[Site]:
    """Insert a guess for every site that follows one of its own kind; return those sites. Run it before the others."""
    stems = [_find_stem(graph, site) for site in sites]
    done = []
    for here, following in pairwise(stems):
        if here is None or following is None or not _hold_the_same(here.residual, following.residual):
            continue
        if here.site.layer == following.site.layer:
            continue
        _insert_guess(graph, following, here.residual)
        done.append(following.site)
    return done


def _find_stem(graph: Graph, site: Site) -> Stem | None:
    if site.masked:  # no node of its graph says which experts
        return None
    fixed = find_constants(graph, site)
    position = {node: i for i, node in enumerate(graph.nodes)}
    results = _nodes_below([read.node for read in site.reads])
    nodes: set[Node] = set()
    frontier = {site.ids}
    while frontier and len(nodes) < STEM_NODES:
        last = max(frontier, key=position.__getitem__)
        if len(frontier) == 1 and last is not site.ids and _is_residual(last, results):
            return Stem(site, last, tuple(sorted(nodes | _fixed_above(nodes, fixed), key=position.__getitem__)))
        if last.op in ("placeholder", "get_attr", "output") or (_has_effect(last) and not _fills_its_own(last)):
            return None
        frontier.remove(last)
        nodes.add(last)
        filled_by = {u for u in last.users if _fills_its_own(u) and u.args[0] is last}
        frontier |= {i for i in last.all_input_nodes if i not in fixed and not _is_size(i)}
        frontier |= {u for u in filled_by if position[u] < position[site.ids]}
        frontier -= nodes
    return None


def _is_size(node: Node) -> bool:
    """A symbolic size that comes in from outside, as it does under dynamic shapes."""
    return node.op == "placeholder" and not isinstance(node.meta.get("example_value"), Tensor)


def _is_residual(node: Node, results: set[Node]) -> bool:
    """Whether the layer's result is added to `node` itself."""
    return any(
        name_of(user) in ("add", "iadd", "add_") and any(i in results for i in user.all_input_nodes if i is not node)
        for user in node.users
    )


def _nodes_below(nodes: Sequence[Node]) -> set[Node]:
    """What depends on `nodes`, the nearest first, as far as a layer's own code may reach."""
    found: dict[Node, None] = dict.fromkeys(nodes)
    for node in (waiting := list(nodes)):
        new = [user for user in node.users if user not in found]
        if len(found) < STEM_NODES:
            found.update(dict.fromkeys(new))
            waiting += new
    return set(found)


def _fixed_above(nodes: set[Node], fixed: Mapping[Node, None]) -> set[Node]:
    """What the stem computes from constants alone: the next layer's place in the graph is too late for it."""
    found: set[Node] = set()
    waiting = [i for node in nodes for i in node.all_input_nodes if i in fixed]
    while waiting:
        node = waiting.pop()
        if node.op not in ("placeholder", "get_attr") and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _has_effect(node: Node) -> bool:
    """Whether running it twice is more than computing it twice."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(getattr(node.target, name)._schema.is_mutable for name in node.target.overloads())
    return name_of(node) in ("setitem", "iadd", "imul")


def _fills_its_own(node: Node) -> bool:
    """Whether its effect is on a tensor that was made for it (a mask of zeros, say): a copy then fills a copy.

    Group-limited routers build their masks so (deepseek_v3). No data leads from such a node to the ids.
    """
    made = node.args[0] if node.args else None
    return _has_effect(node) and isinstance(made, Node) and name_of(made) in FRESH


def _hold_the_same(one: Node, other: Node) -> bool:
    a, b = one.meta.get("example_value"), other.meta.get("example_value")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape


def _insert_guess(graph: Graph, stem: Stem, residual: Node) -> None:
    """Copy `stem` so that it starts from `residual`, and hand what it routes to, to `prefetch`."""
    copies, last = {stem.residual: residual}, residual
    for node in stem.nodes:
        with graph.inserting_after(last):
            last = copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    with graph.inserting_after(last):
        graph.call_function(ops.prefetch, (copies[stem.site.ids], stem.site.bank))
