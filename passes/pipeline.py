"""Which passes run, in which order, and the one place that runs them.

drop_sentinels -> [insert_prefetch] -> [rename_to_slots] -> [load_ahead] -> [leave_unsorted] -> [gate_in_products]
               -> [choose_with_slots] -> [speed_up_products] -> stream_in_waves      offloaded; in brackets: on request
insert_observe                                                          a model whose routing is only counted

before   w = W[ids];  y = bmm(w, x)          ids a constant number of pairs that fit the slots
after    named = fetch(ids, bank);  slots = wait(named, bank);  w = bank[...].view(...)[slots];  y = bmm(w, x)

before   y = grouped_mm(x, W, offs)          any number of pairs
after    y = stream(x, ids, bank, ...)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule

from .ahead import load_ahead
from .bank import Bank
from .fast import speed_up_products
from .gated import gate_in_products
from .inspect import describe_change, op_counts
from .instrument import insert_observe
from .lookahead import insert_prefetch
from .sentinels import drop_sentinels
from .sites import Site
from .slots import rename_to_slots
from .top import choose_with_slots
from .unsorted import leave_unsorted
from .waves import stream_in_waves

#: A pass: a plain function of a graph, which returns the sites it rewrote.
Pass = Callable[[Graph], list[Site]]


@dataclass(frozen=True)
class Report:
    """What one pass did: the `layers` of the sites it rewrote, op-count `change`, and how long it took.

    No node is in it: a report is kept as long as its model, and one node would keep the whole traced graph.
    """

    name: str
    layers: list[Hashable]
    change: str
    elapsed_s: float


def offload_pipeline(
    sites: Sequence[Site],
    banks: Mapping[Hashable, Bank],
    compile_core: Callable[[GraphModule], Callable[..., Tensor]] | None = None,
    overlap: bool = False,
    guess: bool = False,
    on_device: Collection[Hashable] = (),
    few_pairs: Mapping[Hashable, int] | None = None,
    in_any_order: Mapping[Hashable, int] | None = None,
    by_scores: Mapping[Hashable, int] | None = None,
    joins_gates: bool = True,
) -> list[Pass]:
    """Serve every site from its bank: decode sites by slot, the rest in waves.

    With `overlap` decode sites become waves as well: a wave computes what is resident while the rest loads, which a
    renamed index cannot. With `guess` each layer's router is asked a layer earlier, too. In the layers `on_device` it
    is the device that decides which slots a decode step gets. `few_pairs` are the pairs of each layer up to which its
    products may round otherwise, `in_any_order` those up to which each pair has a product of its own: they need not be
    sorted, and, where the rest is compiled without rounding in between (`joins_gates`), a gate is part of it; None:
    never. In the layers `by_scores` the device chooses so many experts of a token as it decides.
    """
    core: dict[str, Any] = {} if compile_core is None else {"compile_core": compile_core}
    few: dict[str, Any] = {} if few_pairs is None else {"few_pairs": few_pairs}
    in_waves = partial(stream_in_waves, sites=sites, banks=banks, **core, **few)
    by_slot = partial(rename_to_slots, sites=sites, banks=banks, on_device=on_device)
    early: list[Pass] = [partial(drop_sentinels, sites=sites)]
    early += [partial(insert_prefetch, sites=sites)] if guess else []
    decode: list[Pass] = [] if overlap else [by_slot]
    if decode and guess and on_device:
        decode.append(partial(load_ahead, sites=sites, on_device=on_device))
    if decode and in_any_order:
        decode.append(partial(leave_unsorted, sites=sites, few_pairs=in_any_order))
        decode += [partial(gate_in_products, sites=sites, few_pairs=in_any_order)] if joins_gates else []
        decode += [partial(choose_with_slots, sites=sites, by_scores=by_scores)] if by_scores else []
    decode += [partial(speed_up_products, sites=sites, **few)] if few and decode else []
    return [*early, *decode, in_waves]


def observe_pipeline(sites: Sequence[Site]) -> list[Pass]:
    """Count every site's ids and change nothing else."""
    return [partial(insert_observe, sites=sites)]


def run_passes(graph: Graph, passes: Sequence[Pass]) -> list[Report]:
    """Apply `passes` in order, check the graph after each, and say what each changed.

    The graph is changed in place: Dynamo reads the placeholders of the very graph it handed over after its backend
    returns, so they must all stay. The caller recompiles the module that owns the graph.
    """
    reports = []
    for apply in passes:
        before, start = op_counts(graph), time.perf_counter()
        rewritten = apply(graph)
        graph.lint()
        name, layers = getattr(apply, "func", apply).__name__, [site.layer for site in rewritten]
        reports.append(Report(name, layers, describe_change(before, op_counts(graph)), time.perf_counter() - start))
    return reports
