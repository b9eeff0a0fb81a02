"""Prefill: everything between routing and weighting becomes one `stream` op.

    before   x_g = x[perm // K];  offs = cumsum(histc(sort(ids)))
             y = grouped_mm(x_g, W1, offs);  y = silu(y[:I]) * y[I:];  y = grouped_mm(y, W2, offs)
             out = (y * weights[perm])[inverse].view(T, K, H).sum(1)
    after    x_g = x[perm // K];
             y = moe_offload.stream(x_g, sorted_ids, bank, [], core, [H], dtype)
             out = (y * weights[perm])[inverse].view(T, K, H).sum(1)

What is cut out, the *core*, is found and copied by `core_graph.py`. It ends where the routing weights come in, so the
weighted sum over K stays in the graph, after all waves: the result does not depend on how experts are grouped into
waves. The core handles any number of pairs; the runtime runs it once per wave, for the pairs whose rows are there. A
site is left alone when `slots` has already renamed it. A masked site (see `masked`) has an op of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from . import ops
from .bank import Bank
from .core import Core
from .core_graph import extract_core, fills_vectors, find_constants, find_core, find_exit, find_inputs
from .erase import erase_orphans
from .fast import speed_up_core
from .masked import extract_masked_core, find_masked_core, refuse_unmasked
from .packed import unpack_at_use
from .row_wise import refuse_mixed_pairs
from .sites import Site


def stream_in_waves(
    graph: Graph,
    *,
    sites: Sequence[Site],
    banks: Mapping[Hashable, Bank],
    compile_core: Callable[[GraphModule], Callable[..., Tensor]] = lambda core: core.forward,
    few_pairs: Mapping[Hashable, int] = MappingProxyType({}),
) -> list[Site]:
    """Replace the core of every site that still reads its weights; return those sites.

    `compile_core` turns a core's graph into what runs it; by default the graph runs as it is. `few_pairs` are those of
    each layer up to which its products may round otherwise.
    """
    done = [site for site in sites if site.reads_weights]
    for site in done:
        fixed = find_constants(graph, site)
        nodes = find_masked_core(graph, site) if site.masked else find_core(graph, site, fixed)
        refuse_mixed_pairs(site, nodes, fixed)
        exit_node = find_exit(site, nodes)
        x, ids, others = find_inputs(site, nodes, fixed)
        if site.masked:
            refuse_unmasked(site, nodes, others)
            whole, part = (extract_masked_core(site, nodes, exit_node, of_wave) for of_wave in (False, True))
            scalars: tuple[int, ...] = ()
        else:
            whole, scalars = extract_core(site, nodes, fixed, exit_node, x, ids, others)
            part, _ = extract_core(site, nodes, fixed, exit_node, x, ids, others, of_wave=True)
        for graph_of_core in (whole, part):
            unpack_at_use(graph_of_core, dict(banks[site.layer].packed), site.layer)
        alone = fills_vectors(site, nodes)
        bank, few = banks[site.layer], few_pairs.get(site.layer, 0) if site.grouped else 0
        core = Core(whole, part, site.grouped, tuple(site.weights), scalars, alone, bank, compile_core, few)
        if not ops.knows_core(core):
            core.run_whole, core.run_part = compile_core(whole), compile_core(part)
            if few:
                core.run_few = compile_core(speed_up_core(whole)), compile_core(speed_up_core(part))
        number = ops.register_core(core)
        value = exit_node.meta["example_value"]
        with graph.inserting_before(exit_node):
            if site.masked:
                out = graph.call_function(ops.stream_masked, (x, site.bank, number, value.shape[-1], value.dtype))
            else:
                shape = list(value.shape[1:])  # of one pair's result
                out = graph.call_function(ops.stream, (x, ids, site.bank, others, number, shape, value.dtype))
        out.meta = dict(exit_node.meta)
        exit_node.replace_all_uses_with(out, delete_user_cb=partial(_is_outside, nodes))
        feeding = [i for node in nodes for i in node.all_input_nodes if i not in nodes]
        for node in reversed(nodes):
            graph.erase_node(node)
        erase_orphans(graph, feeding, also=fixed)
    return done


def _is_outside(nodes: Mapping[Node, None], user: Node) -> bool:
    return user not in nodes
