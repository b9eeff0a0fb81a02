"""Find the core of a site (see `core.py`) in a traced graph, and copy it out into a graph of its own.

It is found by dependence alone: the readers of expert weights, and every node that combines their results with nothing
but each other, constants and other parameters. The graph that it is found in is not changed here; `waves` does that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .grouped import scatter_pairs
from .sites import Site, UnknownUse
from .slots import group_by_slot

VECTORS = 64  # elements that the widest elementwise loop takes at a time


def find_constants(graph: Graph, site: Site) -> dict[Node, None]:
    """Nodes that depend on nothing but the model: parameters, buffers, numbers, and what is computed from them alone.

    A number that a module holds (a clamp limit, say) is an input too when Dynamo traces with dynamic shapes: a tensor
    without dimensions, turned back into a number by `item`.
    """
    fixed: dict[Node, None] = {}
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if node in site.weights.values():
            continue
        if node.op == "placeholder":
            static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
            number = isinstance(value, Tensor) and value.dim() == 0
            if static or number or isinstance(value, torch.nn.Parameter):
                fixed[node] = None
        elif node.op == "get_attr" or _is_number(node):
            fixed[node] = None
        elif node.all_input_nodes and all(i in fixed for i in node.all_input_nodes):
            fixed[node] = None
    return fixed


def _is_number(node: Node) -> bool:
    """Whether a node computes a number from numbers: Dynamo leaves `-limit` in a graph as the call neg(7.0)."""
    return not node.all_input_nodes and getattr(node.target, "__module__", None) in ("_operator", "math")


def find_core(graph: Graph, site: Site, fixed: Mapping[Node, None]) -> dict[Node, None]:
    """The core, in running order (a dict as an ordered set).

    Activations from outside may come in only where a weight does: at a grouped matmul, or at the product of a gathered
    weight. Anywhere later they are the routing weights, and the core ends before them.
    """
    reads = {read.node for read in site.reads}
    views = {view for read in site.reads for view in read.views}
    gathered = {read.node for read in site.reads if read.offsets is None}
    core: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        inputs = node.all_input_nodes
        derived = any(i in core and i not in views for i in inputs)
        closed = all(i in core or i in fixed for i in inputs)
        if node in reads or node in views or (derived and (closed or gathered & set(inputs))):
            core[node] = None
    return core


def find_exit(site: Site, nodes: Mapping[Node, None]) -> Node:
    """The one core node that the rest of the graph uses."""
    exits = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(exits) != 1:
        raise UnknownUse(
            site.layer, ", ".join(site.weights), f"its experts code leaves through {exits}, expected one node"
        )
    return exits[0]


def find_inputs(site: Site, nodes: Mapping[Node, None], fixed: Mapping[Node, None]) -> tuple[Node, Node, list[Node]]:
    """What the core takes from outside besides weights: the pairs' activations, their ids, constants. (Of a masked site
    the activations are what stands for ids.)"""
    ids = site.reader_ids
    known = {*site.weights.values(), *(read.offsets for read in site.reads)} | (set() if site.masked else {ids})
    outside = {i: None for node in nodes for i in node.all_input_nodes if i not in nodes and i not in known}
    activations = [node for node in outside if node not in fixed]
    if len(activations) != 1:
        raise UnknownUse(
            site.layer, ", ".join(site.weights), f"its experts code takes {activations}, expected one tensor"
        )
    needed = _constants_above(outside, fixed)
    return activations[0], ids, [node for node in needed if node.op in ("placeholder", "get_attr")]


def _constants_above(nodes: Iterable[Node], fixed: Mapping[Node, None]) -> list[Node]:
    """The constants among `nodes`, with all that they are computed from, in running order."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in fixed and node not in found:
            for above in node.all_input_nodes:
                visit(above)
            found[node] = None

    for node in nodes:
        visit(node)
    return list(found)


def extract_core(
    site: Site,
    nodes: Mapping[Node, None],
    fixed: Mapping[Node, None],
    exit_node: Node,
    x: Node,
    ids: Node,
    others: Sequence[Node],
    of_wave: bool = False,
) -> tuple[GraphModule, tuple[int, ...]]:
    """The core as `f(x, slots, pairs, *weights, *others)`, which holds nothing of this layer, so that layers can share
    it; and which of the others are numbers.

    With `of_wave`, its matrix products run for the pairs `pairs` alone and leave zeros elsewhere, while everything
    between them still sees all pairs, each in its place: an elementwise kernel rounds the end of a tensor, which does
    not fill a vector register, otherwise than the rest (measured on silu and sigmoid).

        before   y = grouped_mm(x, W, offs)             w = W[ids];        y = bmm(w, x)
        after    s = moe_offload.grouped_mm(x[pairs],   w = W[slots[pairs]]
                     W, slots[pairs])                   s = bmm(w, x[pairs])
                 y = scatter_pairs(s, pairs, len(slots))       y = scatter_pairs(s, pairs, len(slots))
    """
    graph = Graph()
    inputs: dict[Node, Node] = {x: graph.placeholder("x"), ids: graph.placeholder("slots")}
    pairs = graph.placeholder("pairs")
    inputs |= {read.offsets: inputs[ids] for read in site.reads if read.offsets is not None}
    inputs |= {weight: graph.placeholder(name) for name, weight in site.weights.items()}
    inputs |= {other: graph.placeholder(f"other_{i}") for i, other in enumerate(others)}
    matrices, products = _find_products(site) if of_wave else ({}, {})
    grouped = {read.node for read in site.reads if read.offsets is not None}
    scalars = set()
    for node in [*_constants_above([i for n in nodes for i in n.all_input_nodes], fixed), *nodes]:
        if node in inputs:
            continue
        if node.target == "item":
            number = _operand_of(node, 0)
            scalars.add(others.index(number))
            inputs[node] = inputs[number]
            continue
        mine = dict(inputs)
        for operand in matrices.get(node, ()) or products.get(node, ()):
            mine[operand] = graph.call_function(operator.getitem, (inputs[operand], pairs))
        slots_P = inputs[ids]
        if node in grouped and of_wave:
            slots_P = graph.call_function(operator.getitem, (slots_P, pairs))
        inputs[node] = graph.node_copy(node, mine.__getitem__)
        if node in grouped:
            inputs[node] = group_by_slot(graph, inputs[node], slots_P)
        if node in products:
            inputs[node] = graph.call_function(scatter_pairs, (inputs[node], pairs, inputs[ids]))
        inputs[node].meta = {}
    graph.output(inputs[exit_node])
    graph.lint()
    return GraphModule(torch.nn.Module(), graph), tuple(sorted(scalars))


def _find_products(site: Site) -> tuple[dict[Node, tuple[Node, ...]], dict[Node, tuple[Node, ...]]]:
    """The gathers of whole matrices, and the matrix products; each with its operands that have one entry per pair."""
    gathers: dict[Node, tuple[Node, ...]] = {}
    products: dict[Node, tuple[Node, ...]] = {}
    for read in site.reads:
        if read.offsets is not None:
            products[read.node] = (_operand_of(read.node, 0),)
        elif read.node.meta["example_value"].dim() > 2:
            gathers[read.node] = tuple(i for i in read.node.all_input_nodes if i not in site.weights.values())
            for product in read.node.users:
                products[product] = tuple(i for i in product.all_input_nodes if i is not read.node)
    return gathers, products


def _operand_of(node: Node, position: int) -> Node:
    found = node.args[position]
    if not isinstance(found, Node):
        raise TypeError(f"expected a graph node as operand {position} of {node.format_node()}")
    return found


def fills_vectors(site: Site, nodes: Mapping[Node, None]) -> bool:
    """Whether every pair's share of every intermediate fills whole vectors, so that no pair meets the end of a tensor.

    An elementwise kernel takes two vector registers at a time (64 bfloat16 of AVX-512) and rounds what is left over
    otherwise. Nothing is left over, however many pairs there are, when each has a multiple of that: of a masked site,
    each of an expert's tokens.
    """
    kept = 2 if site.masked else 1
    views = {view for read in site.reads for view in read.views}
    for node in nodes:
        value = node.meta.get("example_value")
        if node not in views and isinstance(value, Tensor) and value.is_floating_point():
            share = math.prod(value.shape[kept:])
            if not isinstance(share, int) or share % VECTORS:
                return False
    return True
