"""Decode: gate and up of a pair, and what becomes of them, in one product.

    before   gate, up = moe_offload.grouped_mm(x, V, slots).chunk(2, -1);  h = silu(gate) * up
    after    h = moe_offload.gated_mm(x, V, slots)

and so packed_mm, of a weight that lies packed (see `packed`), becomes packed_gated_mm. On a GPU that is one launch
instead of two, and the two halves are never written. Any other gate is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from . import ops
from .fast import is_of
from .find import name_of
from .sites import Site

#: A product, and the same with a gate.
GATED = {ops.grouped_mm: ops.gated_mm, ops.packed_mm: ops.packed_gated_mm}


def gate_in_products(graph: Graph, *, sites: Sequence[Site], few_pairs: Mapping[Hashable, int]) -> list[Site]:
    """Join the gated product of every site that was renamed to slots and has at most `few_pairs` of its layer."""
    done = []
    for site in sites:
        if site.pairs is None or site.pairs > few_pairs.get(site.layer, 0):
            continue
        products = [node for node in graph.nodes if node.target in GATED and is_of(node, site)]
        gated = [chain for product in products if (chain := _find_chain(product))]
        for chain in gated:
            _join(graph, chain)
        if gated:
            done.append(site)
    return done


def _find_chain(product: Node) -> list[Node]:
    """From a product to its `silu(gate) * up`, if it is used for nothing else; empty if not."""
    halves = _only_user(product)
    if halves is None or name_of(halves) != "chunk" or not _cuts_in_two(halves):
        return []
    parts = {user.args[1]: user for user in halves.users if user.target is operator.getitem}
    if len(halves.users) != 2 or parts.keys() != {0, 1}:
        return []
    silu, end = _only_user(parts[0]), _only_user(parts[1])
    if silu is None or not _is_silu(silu) or end is None or end is not _only_user(silu):
        return []
    is_gated = end.target is operator.mul and set(end.args) == {silu, parts[1]}
    return [product, halves, parts[0], parts[1], silu, end] if is_gated else []


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _cuts_in_two(halves: Node) -> bool:
    given: dict[str, Any] = {**dict(zip(("input", "chunks", "dim"), halves.args, strict=False)), **halves.kwargs}
    return given.get("chunks") == 2 and given.get("dim") in (-1, 1)


def _is_silu(node: Node) -> bool:
    is_silu: bool = node.target is torch.nn.functional.silu
    return is_silu and len(node.args) == 1 and not bool(node.kwargs.get("inplace"))


def _join(graph: Graph, chain: Sequence[Node]) -> None:
    product, end = chain[0], chain[-1]
    with graph.inserting_before(product):
        joined = graph.call_function(GATED[cast(Any, product.target)], product.args)
    joined.meta = dict(end.meta)
    end.replace_all_uses_with(joined)
    for node in reversed(chain):
        graph.erase_node(node)
