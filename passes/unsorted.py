"""Leave the pairs of a decode step as the router named them, where the products take them in any order.

    before   g, perm = sort(ids);  s = slots[perm];  xs = x[perm // K];  y = moe_offload.grouped_mm(xs, V, s) * w[perm]
             back = empty_like(perm);  back[perm] = arange(P);  out = y[back]
    after    y = moe_offload.grouped_mm(x[arange(P) // K], V, slots) * w;  out = y
             for one token: x.expand(P, H), which is x itself

transformers sorts so that the pairs of one expert are neighbours. A kernel that multiplies each pair by itself needs no
neighbours, and on a GPU the sort, the two permutations and the way back are six launches at each layer and step. The
result is the same to the bit where elementwise kernels round every element alike: on a GPU, not on a CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .find import ID_VIEWS, name_of
from .sites import Site


def leave_unsorted(graph: Graph, *, sites: Sequence[Site], few_pairs: Mapping[Hashable, int]) -> list[Site]:
    """Take the sort out of every site that was renamed to slots and has at most `few_pairs` of its layer.

    Run it after `rename_to_slots`: what needed the order, the ends of the groups, is gone then. A site with any other
    use of its sorted ids is left alone.
    """
    done = []
    for site in sites:
        if site.pairs is None or site.sort is None or site.reads_weights:
            continue
        if site.pairs <= few_pairs.get(site.layer, 0) and not _used(site.reader_ids):
            _take_out(graph, site.sort, site.pairs)
            done.append(site)
    return done


def _used(sorted_ids: Node) -> bool:
    """Whether anything but views is made of the sorted ids."""
    return any(name_of(user) not in ID_VIEWS or _used(user) for user in sorted_ids.users)


def _take_out(graph: Graph, sort: Node, pairs: int) -> None:
    order = next(user for user in sort.users if user.target is operator.getitem and user.args[1] == 1)
    with graph.inserting_before(sort):
        value = order.meta["example_value"]
        in_turn = graph.call_function(torch.arange, (pairs,), {"device": value.device})
        in_turn.meta = dict(order.meta)
    for back in [user for user in order.users if name_of(user) == "empty_like"]:
        _take_out_way_back(graph, back, order)
    for user in list(order.users):
        if user.target is operator.getitem and user.args[1] is order and not _is_written(user):  # x[perm]
            _put_instead(graph, user, user.args[0])
        elif name_of(user) == "floordiv":
            _repeat_tokens(graph, user, pairs)
    order.replace_all_uses_with(in_turn)
    for node in (in_turn, order):
        if not node.users:
            graph.erase_node(node)
    _erase_views(graph, sort)


def _take_out_way_back(graph: Graph, back: Node, order: Node) -> None:
    """`back = empty_like(perm); back[perm] = arange(P); y[back]` is y, if that is all that is done with it."""
    writes = [user for user in back.users if user.target is operator.setitem]
    reads = [user for user in back.users if user.target is operator.getitem and user.args[1] is back]
    if len(writes) != 1 or len(writes) + len(reads) != len(back.users) or writes[0].args[1] is not order:
        return
    counted = writes[0].args[2]
    if not isinstance(counted, Node) or name_of(counted) != "arange":
        return
    for read in reads:
        _put_instead(graph, read, read.args[0])
    graph.erase_node(writes[0])
    graph.erase_node(back)
    if not counted.users:
        graph.erase_node(counted)


def _repeat_tokens(graph: Graph, tokens: Node, pairs: int) -> None:
    """`x[perm // K]` of one token is a view: all pairs are of it."""
    for read in [user for user in tokens.users if user.target is operator.getitem and user.args[1] is tokens]:
        hidden = read.args[0]
        x = hidden.meta.get("example_value") if isinstance(hidden, Node) else None
        if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[0] == 1 and not _is_written(read):
            with graph.inserting_before(read):
                same = graph.call_method("expand", (hidden, pairs, -1))
            same.meta = {**read.meta, "example_value": x.expand(pairs, -1)}
            _put_instead(graph, read, same)
    if not tokens.users:
        graph.erase_node(tokens)


def _put_instead(graph: Graph, node: Node, other: Any) -> None:
    node.replace_all_uses_with(other)
    graph.erase_node(node)


def _is_written(copied: Node) -> bool:
    """Whether something is written into what is a copy, and would be no more."""
    return any(
        user.target is operator.setitem or (name_of(user).endswith("_") and user.args[0] is copied)
        for user in copied.users
    )


def _erase_views(graph: Graph, node: Node) -> None:
    for user in list(node.users):
        _erase_views(graph, user)
    if not node.users:
        graph.erase_node(node)
