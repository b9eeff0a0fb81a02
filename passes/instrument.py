"""Count which experts are used, from inside the graph.

    before   ids = topk(...)[1].reshape(-1)            w = W[ids]
    after    ids = topk(...)[1].reshape(-1)
             seen = moe_offload.observe(ids, W)        w = W[seen]

Of a masked site the ids are where its input is not zero (`observe_masked`).
`observe` returns a copy of its ids and the experts read the copy, so no compiler can drop or move the count. It needs
no offload: `W` is only the key that finds the counter. A site whose weights are already served by a bank is left alone:
there the lookup itself counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph

from . import ops
from .sites import Site


def insert_observe(graph: Graph, *, sites: Sequence[Site]) -> list[Site]:
    """Insert one `observe` per site that still reads its stacked weights; return those sites."""
    done = [site for site in sites if site.reads_weights]
    for site in done:
        readers = {read.sort or read.node for read in site.reads}
        with graph.inserting_after(site.ids):
            observe = ops.observe_masked if site.masked else ops.observe
            seen = graph.call_function(observe, (site.ids, site.bank))
        seen.meta = dict(site.ids.meta)
        for reader in readers:
            reader.replace_input_with(site.ids, seen)
    return done
