"""Decode: rename expert ids to slots, and read the bank instead of the stacked weights.

    before   w   = W[ids]                                  y = bmm(w, x) ...
    after    named = moe_offload.fetch(ids, bank)          the slots of these experts; starts what is missing
             slots = moe_offload.wait(named, bank)         all resident; the slots may be read only after this
       or    slots = moe_offload.place(ids, bank)          the same, where the device decides: no host in between
             w     = bank[:, a:b].view(S, 2I, H)[slots]    y = bmm(w, x) ...

    before   g, perm = sort(ids);  offs = cumsum(histc(g, bins=E, max=E-1));  y = grouped_mm(x[perm // K], W, offs)
    after    g, perm = sort(ids);  slots_g = slots[perm];  y = moe_offload.grouped_mm(x[perm // K], V, slots_g)
             where V = bank[:, a:b].view(S, 2I, H)

Biases and scales follow because they are indexed by the same ids. Slots are read after `wait` by data dependence, so
nothing, not even Inductor's scheduler, can move a read before its load. The sort stays on the true ids: sorted by slot,
the pairs would lie in another order, and an elementwise kernel rounds the end of a tensor otherwise than the rest.

A site is left alone when its pairs are not a constant of the graph or do not fit the slots: `waves` takes those. So it
does where weights lie packed in the rows, unless a device decides, whose kernels can read all that are packed: then
they are read by ops that unpack them (see `packed`).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Mapping, Sequence

from torch.fx import Graph, Node

from . import ops
from .bank import Bank
from .erase import erase_orphans
from .packed import is_turned, unpack_reads
from .sites import Site, WeightRead


def rename_to_slots(
    graph: Graph, *, sites: Sequence[Site], banks: Mapping[Hashable, Bank], on_device: Collection[Hashable] = ()
) -> list[Site]:
    """Rewrite every site whose pairs always fit its bank; return those sites.

    `on_device` are the layers whose slots the device can decide. It does where every site of the graph is rewritten
    here: one that goes to `waves` takes all layers back to the host, in the middle of the graph.
    """
    fits = [site for site in sites if site.pairs is not None and site.pairs <= banks[site.layer].slots]
    by_device, done = on_device, fits
    if not on_device or len(fits) < len(sites) or not all(_readable(site, banks[site.layer]) for site in sites):
        done = [site for site in fits if not banks[site.layer].packed]
        by_device = on_device if len(done) == len(sites) else ()
    for site in done:
        slots_P = _insert_fetch(graph, site, site.layer in by_device)
        _read_bank(graph, site, banks[site.layer], slots_P)
    return done


def _insert_fetch(graph: Graph, site: Site, by_device: bool) -> Node:
    """Ask for the rows as early as the ids allow; return the slots in the order of the readers' ids."""
    with graph.inserting_after(site.ids):
        added = [graph.call_function(ops.place if by_device else ops.fetch, (site.ids, site.bank))]
    if not by_device:
        with graph.inserting_after(added[0]):
            added.append(graph.call_function(ops.wait, (added[0], site.bank)))
    slots_P = added[-1]
    if site.order is not None:
        with graph.inserting_after(site.order):
            added.append(graph.call_function(operator.getitem, (slots_P, site.order)))
    for node in added:
        node.meta = {k: v for k, v in site.ids.meta.items() if k in ("example_value", "nn_module_stack", "stack_trace")}
    return added[-1]


def _read_bank(graph: Graph, site: Site, bank: Bank, slots_P: Node) -> None:
    with graph.inserting_before(min(read.entry for read in site.reads)):
        views = bank.view_nodes(graph, site.bank, site.weights)
    packed = dict(bank.packed)
    for read in site.reads:
        name, use = _name_of(site, read), read.node
        if read.offsets is None and read.entry is use and use.target is operator.getitem and bank.is_retyped(name):
            _pick(graph, site, bank, name, use, slots_P)
            continue
        if name not in packed:
            read.entry.replace_input_with(site.weights[name], views[name])
        if read.offsets is None:
            use.replace_input_with(site.reader_ids, slots_P)
        else:
            use = group_by_slot(graph, use, slots_P)
        if name in packed:
            unpack_reads(graph, site.weights[name], site.bank, packed[name], site.layer, only=[use])
    erase_orphans(graph, [read.offsets for read in site.reads if read.offsets is not None])


def _pick(graph: Graph, site: Site, bank: Bank, name: str, use: Node, slots_P: Node) -> None:
    assert site.pairs is not None
    with graph.inserting_before(use):
        picked = bank.picked_nodes(graph, site.bank, name, slots_P, site.pairs)
    picked.meta = dict(use.meta)
    use.replace_all_uses_with(picked)
    graph.erase_node(use)


def _name_of(site: Site, read: WeightRead) -> str:
    return next(name for name, weight in site.weights.items() if weight in read.entry.all_input_nodes)


def _readable(site: Site, bank: Bank) -> bool:
    """Whether a device can read what of the weights lies packed."""
    packed = dict(bank.packed)
    return all(
        ops.is_readable(packed[name], is_turned(read.views, site.layer) if read.offsets is not None else None)
        for read in site.reads
        if (name := _name_of(site, read)) in packed
    )


def group_by_slot(graph: Graph, node: Node, slots_P: Node) -> Node:
    """Replace `grouped_mm(x, W, offs)` by our own, whose groups are the runs of equal slots."""
    with graph.inserting_before(node):
        ours = graph.call_function(ops.grouped_mm, (node.args[0], node.args[1], slots_P))
    ours.meta = dict(node.meta)
    node.replace_all_uses_with(ours)
    graph.erase_node(node)
    return ours
