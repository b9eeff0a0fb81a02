"""Decode where the device decides: let what decides choose the best experts, too.

    before   v, ids = topk(scores, K);  slots = moe_offload.place(ids.view(-1), bank)
    after    v, ids, slots = moe_offload.place_top(scores, K, bank)

On a GPU topk is two kernels, whose result is read by the one that decides: one launch instead of three. What the router
makes of the scores before and after stays as it is, and so do the ids.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from . import ops
from .find import name_of
from .sites import Site

MOST = 32  # experts of a token
SAME = {"reshape", "view", "flatten", "contiguous", "detach", "clone", "long"}  # the ids again, in their order
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def choose_with_slots(graph: Graph, *, sites: Sequence[Site], by_scores: Mapping[Hashable, int]) -> list[Site]:
    """Join topk and `place` in every site whose ids are those of a topk, as they came, of the K that `by_scores` has
    for its layer.

    Run it after `rename_to_slots`. A bank that two sites share is left alone: between topk and `place` of the one,
    slots that the other was given may be read.
    """
    banks = [site.bank for site in sites]
    done = []
    for site in sites:
        place = next((user for user in site.ids.users if user.target is ops.place), None)
        top = _find_top(site.ids)
        if place is None or top is None or banks.count(site.bank) > 1:
            continue
        scores, k = _arguments(top)
        if by_scores.get(site.layer) == k and _fits(scores, k, site):
            _join(graph, top, place, scores, k)
            done.append(site)
    return done


def _find_top(ids: Node) -> Node | None:
    """The topk whose indices these ids are, in their order and never written to."""
    node: Any = ids
    while isinstance(node, Node) and name_of(node) in SAME:
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != 1:
        return None
    top: Any = node.args[0]
    is_top = isinstance(top, Node) and (top.target is torch.topk or (top.op == "call_method" and top.target == "topk"))
    return top if is_top and not _is_written(node) else None


def _is_written(ids: Node) -> bool:
    """Whether something is written to the ids, or to a view of them."""
    return any(
        user.target is operator.setitem or name_of(user).endswith("_") or (name_of(user) in SAME and _is_written(user))
        for user in ids.users
    )


def _arguments(top: Node) -> tuple[Any, Any]:
    """Scores and K of a topk along the last dimension that is sorted, largest first; else None for K."""
    names = ("input", "k", "dim", "largest", "sorted")
    given = {"dim": -1, "largest": True, "sorted": True, **dict(zip(names, top.args, strict=False)), **top.kwargs}
    scores, k = given["input"], given["k"]
    value = scores.meta.get("example_value") if isinstance(scores, Node) else None
    last = isinstance(value, torch.Tensor) and given["dim"] in (-1, value.dim() - 1)
    return scores, k if last and given["largest"] is True and given["sorted"] is True and len(given) == 5 else None


def _fits(scores: Node, k: Any, site: Site) -> bool:
    value: Any = scores.meta.get("example_value")
    return (
        type(k) is int
        and k <= MOST
        and value.dim() == 2
        and value.shape[1] == site.num_experts
        and value.shape[0] * k == site.pairs
        and value.dtype in DTYPES
    )


def _join(graph: Graph, top: Node, place: Node, scores: Node, k: int) -> None:
    slots_value = place.meta["example_value"].new_empty(place.meta["example_value"].numel(), dtype=torch.int64)
    with graph.inserting_before(top):
        joined = graph.call_function(ops.place_top, (scores, k, place.args[1]))
        slots = graph.call_function(operator.getitem, (joined, 2))
    joined.meta = {**top.meta, "example_value": (*top.meta["example_value"], slots_value)}
    slots.meta = {**place.meta, "example_value": slots_value}
    top.replace_all_uses_with(joined)
    place.replace_all_uses_with(slots)
    graph.erase_node(place)
    graph.erase_node(top)
