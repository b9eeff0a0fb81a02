"""Erase the nodes of a graph that nothing uses since a pass has rewritten it, and no others.

Never `graph.eliminate_dead_code()`: on a Dynamo graph it deletes in-place calls, among them the writes to a static KV
cache (measured: logits off by 2).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch.fx import Graph, Node

from . import ops

#: What only ever prepared a core: the histogram that became group offsets.
PURE = (torch.histc, torch.cumsum, "float", "int", "cumsum", "to")


def erase_orphans(graph: Graph, nodes: Iterable[Node], also: Collection[Node] = ()) -> None:
    """Erase each of `nodes` that nothing uses any more, then what fed only it: calls in `PURE`, and any in `also`."""
    waiting = dict.fromkeys(node for node in nodes if node.op != "placeholder")
    while waiting:
        node = waiting.popitem()[0]
        if not node.users and (node in also or node.target in PURE):
            above = [i for i in node.all_input_nodes if i.op != "placeholder"]
            graph.erase_node(node)
            waiting |= dict.fromkeys(above)


def erase_unserved(graph: Graph) -> None:
    """Take out what raises in a graph that is not rewritten: this one is about to be.

    before   checked = moe_offload.unserved(ids);  w = W[checked]
    after    w = W[ids]
    """
    for node in [node for node in graph.nodes if node.target is ops.unserved]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
