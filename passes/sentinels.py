"""Drop the guards against ids that mean "not mine", which transformers up to 5.20 puts into every grouped layer.

    before   g, perm = sort(ids);  mask = (g >= E).unsqueeze(-1);  g.clamp_(max=E - 1);  x.masked_fill_(mask, 0)
             y = grouped_mm(x, W1, offs).masked_fill(mask, 0);  ...
    after    g, perm = sort(ids)
             y = grouped_mm(x, W1, offs);  ...

Such ids come from expert parallelism only. Without it every id is an expert's, the masks are all false, and filling by
them copies what is there. Nothing is lost by leaving them out: whatever serves the rewritten graph refuses an id that
is no expert's, clamped or not.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node

from .find import ID_VIEWS, name_of
from .sites import Site

FILLS = ("masked_fill", "masked_fill_")


def drop_sentinels(graph: Graph, *, sites: Sequence[Site]) -> list[Site]:
    """Take the guards out of every grouped site that has them; return those sites. Run it before the others."""
    done = []
    for site in sites:
        if not site.grouped:
            continue
        ids = _views_of(site.reader_ids)
        masks = [user for node in ids for user in node.users if _is_mask(user, site.num_experts)]
        fills = [user for mask in masks for view in _views_of(mask) for user in view.users if name_of(user) in FILLS]
        clamps = [user for node in ids for user in node.users if name_of(user) == "clamp_" and masks]
        for node in (*fills, *clamps):
            guarded = node.args[0]
            if not isinstance(guarded, Node):
                raise TypeError(f"expected a graph node, found {guarded!r} in {node.format_node()}")
            node.replace_all_uses_with(guarded)
            graph.erase_node(node)
        for node in reversed([view for mask in masks for view in _views_of(mask)]):
            if not node.users:
                graph.erase_node(node)
        if fills:
            done.append(site)
    return done


def _is_mask(node: Node, num_experts: int) -> bool:
    return name_of(node) == "ge" and bool(node.args[1] == num_experts)


def _views_of(node: Node) -> list[Node]:
    """`node`, and what only re-views or re-types it."""
    found = [node]
    for known in found:
        found += [user for user in known.users if name_of(user) in ID_VIEWS | {"unsqueeze"} and user not in found]
    return found
