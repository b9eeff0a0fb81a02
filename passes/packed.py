"""Weights that lie packed (quantised) in the rows of a bank: a core reads them through ops that unpack what they use.

    before   y = moe_offload.grouped_mm(x, W.transpose(-2, -1), slots)     w = W[slots]
    after    y = moe_offload.packed_mm(x, bank, slots, 3, True)            w = moe_offload.unpack(bank, slots, 3)

where W is a packed weight, known to the ops as number 3, and the placeholder that was W's is handed the bank.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from . import ops
from .find import name_of
from .sites import UnknownUse

TRANSPOSES = ("transpose", "mT", "swapaxes", "permute")
COPIES = ("contiguous", "detach")  # views of the stacked weight that need nothing: there is no such stack to copy


def unpack_at_use(core: GraphModule, packed: Mapping[str, int], layer: Hashable) -> None:
    """Rewrite every read of the weights named in `packed`. Raises `UnknownUse` for a read of another kind."""
    graph = core.graph
    found = [
        (placeholder, packed[str(placeholder.target)], views, use)
        for placeholder in graph.nodes
        if placeholder.op == "placeholder" and placeholder.target in packed
        for views, use in _find_reads(placeholder)
    ]
    for bank, number, views, use in found:
        turned = [_is_transpose(view, layer) for view in views]
        with graph.inserting_before(use):
            if use.target is ops.grouped_mm:
                args = (use.args[0], bank, use.args[2], number, sum(turned) % 2 == 1)
                served = graph.call_function(ops.packed_mm, args)
            elif use.target is operator.getitem and isinstance(use.args[1], Node):
                served = graph.call_function(ops.unpack, (bank, use.args[1], number))
                if sum(turned) % 2:
                    served = graph.call_method("transpose", (served, -2, -1))
            else:
                raise UnknownUse(layer, str(bank.target), f"{use.format_node()} of a weight that lies packed")
        use.replace_all_uses_with(served)
        graph.erase_node(use)
        for view in reversed(views):
            if not view.users:
                graph.erase_node(view)
    graph.lint()
    core.recompile()


def _find_reads(weight: Node) -> list[tuple[tuple[Node, ...], Node]]:
    found: list[tuple[tuple[Node, ...], Node]] = []
    for user in weight.users:
        if name_of(user) in (*TRANSPOSES, *COPIES) and user.args[0] is weight:
            found += [((user, *views), use) for views, use in _find_reads(user)]
        else:
            found.append(((), user))
    return found


def _is_transpose(view: Node, layer: Hashable) -> bool:
    """Whether a view exchanges the two dimensions of every matrix; any other that changes something is refused."""
    if name_of(view) in COPIES:
        return False
    dims: list[Any] = [d for arg in view.args[1:] for d in (arg if isinstance(arg, (tuple, list)) else (arg,))]
    if name_of(view) == "mT" or dims == [0, 2, 1]:
        return True
    if name_of(view) != "permute" and sorted(d % 3 for d in dims if isinstance(d, int)) == [1, 2]:
        return True
    raise UnknownUse(layer, str(view.args[0]), f"{view.format_node()} of a weight that lies packed")
