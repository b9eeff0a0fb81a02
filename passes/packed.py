"""Weights that lie packed (quantised) in the rows of a bank: they are read through ops that unpack what they use.

    before   y = moe_offload.grouped_mm(x, W.transpose(-2, -1), slots)     w = W[slots]
    after    y = moe_offload.packed_mm(x, bank, slots, 3, True)            w = moe_offload.unpack(bank, slots, 3)

where W is a packed weight, known to the ops as number 3. In a core the placeholder that was W's is handed the bank; in
a graph of the model there is one placeholder for the bank.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from . import ops
from .find import name_of
from .sites import UnknownUse

TRANSPOSES = ("transpose", "mT", "swapaxes", "permute")
COPIES = ("contiguous", "detach")  # views of the stacked weight that need nothing: there is no such stack to copy


def unpack_at_use(core: GraphModule, packed: Mapping[str, int], layer: Hashable) -> None:
    """Rewrite every read of the weights named in `packed`. Raises `UnknownUse` for a read of another kind."""
    graph = core.graph
    found = [node for node in graph.nodes if node.op == "placeholder" and node.target in packed]
    for placeholder in found:
        unpack_reads(graph, placeholder, placeholder, packed[str(placeholder.target)], layer)
    graph.lint()
    core.recompile()


def unpack_reads(
    graph: Graph, weight: Node, bank: Node, number: int, layer: Hashable, only: Collection[Node] | None = None
) -> None:
    """Rewrite the reads of one packed weight, those that are `only` some nodes or all, to reads of `bank`. Raises
    `UnknownUse` for a read of another kind."""
    for views, use in _find_reads(weight):
        if only is not None and use not in only:
            continue
        turned = is_turned(views, layer)
        with graph.inserting_before(use):
            if use.target is ops.grouped_mm:
                served = graph.call_function(ops.packed_mm, (use.args[0], bank, use.args[2], number, turned))
            elif use.target is operator.getitem and isinstance(use.args[1], Node):
                served = graph.call_function(ops.unpack, (bank, use.args[1], number))
                if turned:
                    served = graph.call_method("transpose", (served, -2, -1))
            else:
                raise UnknownUse(layer, str(weight.target), f"{use.format_node()} of a weight that lies packed")
        served.meta = dict(use.meta)
        use.replace_all_uses_with(served)
        graph.erase_node(use)
        for view in reversed(views):
            if not view.users:
                graph.erase_node(view)


def is_turned(views: Sequence[Node], layer: Hashable) -> bool:
    """Whether views of a packed weight together exchange the two dimensions of every matrix. Raises `UnknownUse` for
    one that changes anything else."""
    return sum(_is_transpose(view, layer) for view in views) % 2 == 1


def _find_reads(weight: Node) -> list[tuple[tuple[Node, ...], Node]]:
    found: list[tuple[tuple[Node, ...], Node]] = []
    for user in weight.users:
        if name_of(user) in (*TRANSPOSES, *COPIES) and user.args[0] is weight:
            found += [((user, *views), use) for views, use in _find_reads(user)]
        else:
            found.append(((), user))
    return found


def _is_transpose(view: Node, layer: Hashable) -> bool:
    """Whether a view exchanges the two dimensions of every matrix."""
    if name_of(view) in COPIES:
        return False
    dims: list[Any] = [d for arg in view.args[1:] for d in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    if name_of(view) == "mT" or dims == [0, 2, 1]:
        return True
    if name_of(view) != "permute" and sorted(d % 3 for d in dims if isinstance(d, int)) == [1, 2]:
        return True
    raise UnknownUse(layer, str(view.args[0]), f"{view.format_node()} of a weight that lies packed")
