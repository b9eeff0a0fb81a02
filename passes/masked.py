"""The core of a masked site: a product over all experts at once becomes one over those that got a token.

    before   y = bmm(x, W);  y = silu(y[..., :I]) * y[..., I:];  out = bmm(y, V)           x [E, T, H], mostly zeros
    after    out = moe_offload.stream_masked(x, bank, core, [N], dtype)
             core(x, slots):  y = bmm(x, W[slots]);  y = silu(y[..., :I]) * y[..., I:];  out = bmm(y, V[slots])

An expert whose rows are zero gives zeros, and need not be computed, where

    nothing is added in between (a bias would be another reader of a weight, which no pattern knows),
    what is in between makes zeros of zeros (tried out here), for each row by itself (`row_wise`),
    and its weights are finite: zero times infinity is NaN. Whoever serves the bank answers for that.

The zeros stay in their places, so the sum over all E, which comes after, adds in the order that it always did.

Shapes: E experts, T tokens, H hidden, N outputs, R experts of one wave.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .grouped import scatter_pairs
from .sites import Site, UnknownUse


def find_masked_core(graph: Graph, site: Site) -> dict[Node, None]:
    """The readers of a masked site and what lies between them, in running order (a dict as an ordered set)."""
    reads = {read.node for read in site.reads}
    views = {view for read in site.reads for view in read.views}
    below: dict[Node, None] = {}
    for node in graph.nodes:
        if node in reads or node in views or any(i in below and i not in views for i in node.all_input_nodes):
            below[node] = None
    core: set[Node] = set()
    for node in reversed(below):
        if node in reads or node in views or any(user in core for user in node.users):
            core.add(node)
    return {node: None for node in below if node in core}


def refuse_unmasked(site: Site, core: Mapping[Node, None], others: list[Node]) -> None:
    """Raise `UnknownUse` unless zeros stay zeros between the products of a masked site."""
    if others:  # what they hold is not known here
        raise _unknown(site, f"{others} come in between its products, so zeros may not stay zeros")
    values: dict[Node, Any] = {site.ids: torch.zeros((1, 1, 1))}
    views = {view for read in site.reads for view in read.views}
    products = {read.node for read in site.reads}
    for node in core:
        if node in products:
            if torch.any(values[_operand_of(node)] != 0):
                raise _unknown(site, f"{_operand_of(node).format_node()} is not zero where an expert gets no token")
            like = node.meta["example_value"]
            values[node] = torch.zeros((1, 1, like.shape[-1]), dtype=like.dtype)
        elif node not in views:
            values[node] = _run(node, values)


def extract_masked_core(site: Site, core: Mapping[Node, None], exit_node: Node, of_wave: bool = False) -> GraphModule:
    """The core as `f(x, slots, pairs, *weights)`: x [R, T, H] of the experts in `slots`.

    With `of_wave` x is that of all experts, and the products run for the experts `pairs` alone and leave zeros
    elsewhere, so that each element keeps its place (see `core_graph.extract_core`).
    """
    graph = Graph()
    mine: dict[Node, Node] = {site.ids: graph.placeholder("x")}
    slots, pairs = graph.placeholder("slots"), graph.placeholder("pairs")
    mine |= {weight: graph.placeholder(name) for name, weight in site.weights.items()}
    products = {read.node for read in site.reads}
    for node in core:
        if node not in products:
            mine[node] = graph.node_copy(node, lambda n: _copied(n, graph, mine))
            mine[node].meta = {}
            continue
        x, matrices = (mine[i] for i in node.args[:2])  # type: ignore[index]
        mine[node] = _product(graph, node, x, matrices, slots, pairs, of_wave)
    graph.output(mine[exit_node])
    graph.lint()
    return GraphModule(torch.nn.Module(), graph)


def _product(graph: Graph, node: Node, x: Node, matrices: Node, slots: Node, pairs: Node, of_wave: bool) -> Node:
    if not of_wave:
        return graph.call_function(torch.bmm, (x, graph.call_function(operator.getitem, (matrices, slots))))
    x_R, slots_R = (graph.call_function(operator.getitem, (each, pairs)) for each in (x, slots))
    matrices_R = graph.call_function(operator.getitem, (matrices, slots_R))
    product = graph.call_function(torch.bmm, (x_R, matrices_R))
    return graph.call_function(scatter_pairs, (product, pairs, slots))


def _copied(node: Node, graph: Graph, mine: dict[Node, Node]) -> Node:
    """A constant that is computed in the graph is copied where it is first used."""
    if node not in mine:
        mine[node] = graph.node_copy(node, lambda n: _copied(n, graph, mine))
    return mine[node]


def _run(node: Node, values: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else _run(n, values))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if not callable(node.target):
        raise TypeError(f"expected a call, found {node.format_node()}")
    return node.target(*args, **kwargs)


def _operand_of(product: Node) -> Node:
    operand = product.args[0]
    if not isinstance(operand, Node):
        raise TypeError(f"expected a graph node as what {product.format_node()} multiplies")
    return operand


def _unknown(site: Site, said: str) -> UnknownUse:
    return UnknownUse(site.layer, ", ".join(site.weights), said)
