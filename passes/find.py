"""Find where a graph reads stacked expert weights. The graph is not changed.

Shapes: P token-expert pairs, E experts, H hidden, I inner.

The search starts at the weights and walks forward to what reads them, then back from that reader to the expert ids.
It never looks for `topk`: routers differ (masked argmax, hash tables, skip classes), and some use the true ids again
after choosing them, so the ids must be renamed where the experts code reads them and nowhere else.

    indexed    w = W[ids]                        W a weight [E, ...] or a bias [E, N]; ids [P]
    grouped    ids_g, perm = sort(ids)           offs say where each expert's rows end in x_g [P, H]
               offs = cumsum(histc(ids_g, bins=E, min=0, max=E-1))
               y = grouped_mm(x_g, W or W.transpose(-2, -1), offs)
               b = B[ids_g]                      a bias of the grouped form follows the sorted ids
    masked     y = bmm(x, W)                     x [E, T, H]: all tokens for each expert, zeros where it did not get one
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .sites import Site, UnknownUse, Weight, WeightRead

#: Methods and functions that only re-view or re-type a tensor: a weight is followed through them.
VIEWS = {"transpose", "permute", "t", "mT", "contiguous", "to", "type", "float", "bfloat16", "half", "detach"}
#: The same, for the way back from offsets to the sort: these keep the order of the ids.
ID_VIEWS = VIEWS | {"reshape", "view", "flatten", "int", "long", "clone"}
GROUPED_MM = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
BATCHED_MM = {"bmm", "matmul"}


def find_sites(graph: Graph, weights: Mapping[Node, Weight]) -> list[Site]:
    """The sites of `graph`, in running order; `weights` says which placeholders hold which stacked parameter.

    Raises `UnknownUse` when a weight is read in a way no entry of `PATTERNS` matches: a graph that was only half
    understood must not be rewritten.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    sites: dict[tuple[Hashable, Node], Site] = {}
    masked: list[tuple[Weight, Node, WeightRead]] = []
    for placeholder, weight in weights.items():
        for views, use in _find_uses(placeholder):
            read = next((r for match in PATTERNS.values() if (r := match(use)) is not None), None)
            if read is None or (read.masked and use.args[1] is not (views or (placeholder,))[-1]):
                raise UnknownUse(weight.layer, weight.field, use.format_node() or str(use))
            read = replace(read, views=views)
            if read.masked:
                masked.append((weight, placeholder, read))
                continue
            site = sites.setdefault((weight.layer, read.ids), Site(weight.layer, weight.num_experts, read.ids))
            site.weights[weight.field] = placeholder
            site.reads.append(read)
    masked.sort(key=lambda one: position[one[2].node])
    return sorted([*sites.values(), *_group_masked(masked)], key=lambda site: position[site.ids])


def _group_masked(reads: Sequence[tuple[Weight, Node, WeightRead]]) -> list[Site]:
    """The sites of masked reads, given in running order: a call of a layer reads each of its weights once."""
    sites: list[Site] = []
    last: dict[Hashable, Site] = {}
    for weight, placeholder, read in reads:
        site = last.get(weight.layer)
        if site is None or weight.field in site.weights:
            site = last[weight.layer] = Site(weight.layer, weight.num_experts, read.ids)
            sites.append(site)
        site.weights[weight.field] = placeholder
        site.reads.append(read)
    return sites


def match_indexed(use: Node) -> WeightRead | None:
    """`W[ids]`, where the ids may themselves be the sorted ids of a grouped site (its biases)."""
    if name_of(use) not in ("getitem", "index_select") or len(use.args) < 2:
        return None
    if name_of(use) == "index_select" and use.args[1] != 0:  # another dimension than the experts'
        return None
    ids = use.args[-1]
    if isinstance(ids, (tuple, list)) and len(ids) == 1:
        ids = ids[0]
    if not isinstance(ids, Node):
        return None
    sort = _sort_above(ids)
    return WeightRead(use, ids) if sort is None else WeightRead(use, _expect_node(sort.args[0]), sort=sort)


def match_grouped(use: Node) -> WeightRead | None:
    """`grouped_mm(x, W, offs)` with `offs = cumsum(histc(sort(ids)))`."""
    if name_of(use) not in GROUPED_MM:
        return None
    offsets = use.kwargs.get("offs", use.args[2] if len(use.args) > 2 else None)
    histc = offsets
    while isinstance(histc, Node) and name_of(histc) in ID_VIEWS | {"cumsum"}:
        histc = histc.args[0]
    if not isinstance(offsets, Node) or not isinstance(histc, Node) or name_of(histc) != "histc":
        return None
    sort = _sort_above(_expect_node(histc.args[0]))
    return None if sort is None else WeightRead(use, _expect_node(sort.args[0]), sort=sort, offsets=offsets)


def match_masked(use: Node) -> WeightRead | None:
    """`bmm(x, W)`, x [E, T, H]."""
    if name_of(use) not in BATCHED_MM or len(use.args) != 2 or not isinstance(use.args[0], Node):
        return None
    value = use.args[0].meta.get("example_value")
    if isinstance(value, torch.Tensor) and value.dim() != 3:  # broadcast over the experts: nothing is masked
        return None
    return WeightRead(use, use.args[0], masked=True)


#: Adding a form = one function above and one line here; `tests/passes/test_find.py` runs over every entry.
PATTERNS: dict[str, Callable[[Node], WeightRead | None]] = {
    "indexed": match_indexed,
    "grouped": match_grouped,
    "masked": match_masked,
}


def name_of(node: Node) -> str:
    """The bare name of what a node calls: 'getitem', 'bmm', 'grouped_mm_fallback', ..."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else target._schema.name
        return str(name.rpartition("::")[2])
    wrapped = getattr(target, "_qualname", None) or getattr(target, "__name__", None)
    return str(wrapped or target).rpartition("::")[2]


def _find_uses(weight: Node) -> list[tuple[tuple[Node, ...], Node]]:
    """The nodes that read `weight`, each with the views of it that lead there."""
    found: list[tuple[tuple[Node, ...], Node]] = []
    for user in weight.users:
        if name_of(user) in VIEWS and user.args and user.args[0] is weight and _keeps_experts_first(user, weight):
            found += [((user, *views), use) for views, use in _find_uses(user)]
        else:
            found.append(((), user))
    return found


def _keeps_experts_first(view: Node, weight: Node) -> bool:
    """Whether the first dimension of `weight` is still the first of `view`: what is indexed there are experts."""
    value, name = weight.meta.get("example_value"), name_of(view)
    rank = value.dim() if isinstance(value, torch.Tensor) else None
    dims: list[Any] = [d for arg in view.args[1:] for d in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    if rank is not None:
        dims = [d % rank if isinstance(d, int) else d for d in dims]
    if name == "transpose":
        return 0 not in dims
    if name == "permute":
        return bool(dims) and dims[0] == 0
    return name != "t" and not (name == "mT" and rank == 2)


def _sort_above(node: Node) -> Node | None:
    """The sort whose sorted values `node` is, looking through casts; None if it is not sorted ids."""
    while name_of(node) in ID_VIEWS and node.op != "placeholder":
        node = _expect_node(node.args[0])
    if node.target is not operator.getitem or node.args[1] != 0 or not isinstance(node.args[0], Node):
        return None
    return node.args[0] if name_of(node.args[0]) == "sort" else None


def _expect_node(value: Any) -> Node:
    if not isinstance(value, Node):
        raise TypeError(f"expected a graph node, found {value!r}")
    return value
