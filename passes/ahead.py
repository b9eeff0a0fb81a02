"""Decode where the device decides: load what the next layer's router guesses, beside this layer, without the host.

    before   moe_offload.prefetch(guess2, bank2);  s = place(ids1, bank1);             y1 = products(bank1, s) ...
    after    s = place(ids1, bank1);  then = moe_offload.place_ahead(guess2, s, bank2);  y1 = products(bank1, then) ...

`place_ahead` takes the slots of the layer that is computed, so it comes after that layer's own rows have been asked
for: they go first. It gives the same slots back, so that it comes before the products: Inductor would join the guess
with the next layer's own router (seen with deepseek_v3), where there is nothing left to hide it behind. And the bank
that it says it mutates keeps it before `place` of the next layer.

A guess from a layer of the device for one of the host, or the other way round, is dropped: the host would load into
slots that the device decides about.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from torch.fx import Graph, Node

from . import ops
from .sites import Site


def load_ahead(graph: Graph, *, sites: Sequence[Site], on_device: Collection[Hashable]) -> list[Site]:
    """Let the device load what was guessed for the layers `on_device`; return the sites that the guesses are for.

    Run it after `insert_prefetch` and `rename_to_slots`. A graph in which no site is decided by the device stays as it
    is.
    """
    slots = [_slots_of(site) for site in sites]
    if not any(slots):
        return []
    banks = [site.bank for site in sites]
    done = []
    for guess in [node for node in graph.nodes if node.target is ops.prefetch]:
        ids, bank = guess.args
        at = banks.index(bank)
        placed = slots[at - 1] if at and banks.count(bank) == 1 else None
        if placed is not None and slots[at] is not None:
            readers = list(placed.users)
            with graph.inserting_after(placed):
                then = graph.call_function(ops.place_ahead, (ids, placed, bank))
            then.meta = dict(placed.meta)
            for reader in readers:
                reader.replace_input_with(placed, then)
            done.append(sites[at])
        if placed is not None or sites[at].layer in on_device:
            graph.erase_node(guess)
    return done


def _slots_of(site: Site) -> Node | None:
    """The slots that the device decides for a site."""
    return next((user for user in site.ids.users if user.target is ops.place), None)
