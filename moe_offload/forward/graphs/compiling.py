"""The torch.compile backend: find the offloaded experts in a traced graph, run the passes, run or compile the result.

At this level (Dynamo's FX graph) parameters are graph inputs and `example_inputs` are the very objects the model holds,
so a *phantom* (what `patch_model` left in place of a stacked weight) is recognised by itself, never by a name.

Three rules hold for every rewrite:
- the graph is changed in place and keeps every placeholder: Dynamo reads them after the backend has returned;
- the bank comes in through the placeholder of the layer's first weight, re-typed, and is substituted at each call;
- the argument of that call says which bank it is, because Dynamo may share one graph between layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

import passes
from passes import ops

from ...errors import OffloadError, UnsupportedModelError
from ...observe import progress
from ..changed_parts import explain_refusal
from .cuda_graphs import can_be_recorded, copy_outputs, is_static
from .ops import bank_of
from .phantom import Phantom, phantoms_in
from .products import PRODUCT_PER_PAIR
from .recordings import launch
from .small_kernels import both_kinds_together
from .small_kernels import options as small_kernels

logger = logging.getLogger("moe_offload")

#: Inductor's options for a decode step that never needs the host: it becomes a CUDA graph, but for the parts that are
#: no kernels (a sliding window's counter).
CUDA_GRAPH = {"triton.cudagraphs": True, "graph_partition": True}

Compiled = Callable[..., Any]
#: What runs a rewritten graph: Inductor, or the graph itself.
Inner = Callable[[GraphModule, list[Any]], Compiled]


def make_backend(
    inner: Inner,
    compile_core: Callable[[GraphModule], Compiled],
    log: list[Any],
    overlap: bool = False,
    guess: bool = False,
    few_tokens: int = 0,
) -> Compiled:
    """A backend for torch.compile; each graph's pass reports are appended to `log`.

    `overlap` and `guess` are those of `passes.offload_pipeline`. Products of up to `few_tokens` may round otherwise.
    """

    pipeline = partial(passes.offload_pipeline, compile_core=compile_core, overlap=overlap, guess=guess)

    def backend(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Compiled:
        phantoms = phantoms_in(example_inputs)
        progress.name_stage("rewriting")
        if not phantoms:
            log.append([])
            return _counted(inner(gm, list(example_inputs)))
        on_device = {one.layer.moe.name for one in phantoms.values() if one.layer.device_cache is not None}
        moe_layers = {one.layer.moe.name: one.layer.moe for one in phantoms.values()}
        few_pairs = {name: few_tokens * moe.top_k for name, moe in moe_layers.items()} if few_tokens else None
        on_gpu = {one.layer.moe.name for one in phantoms.values() if is_on_gpu(one.layer.slots.bank_SN)}
        any_order = dict.fromkeys(on_device & on_gpu, PRODUCT_PER_PAIR)
        deciding = {one.layer.moe.name: one.layer.device_cache for one in phantoms.values()}
        by_scores = {
            name: moe_layers[name].top_k
            for name in any_order
            if (cache := deciding[name]) is not None and cache.chooses_as_torch()
        }
        how = {"on_device": on_device, "few_pairs": few_pairs, "in_any_order": any_order, "by_scores": by_scores}
        of_device = partial(pipeline, **how, joins_gates=joins_gates(inner))
        reports, banked = rewrite_graph(gm, phantoms, of_device)
        log.append(reports)
        inputs = list(example_inputs)
        for position in banked:
            inputs[position] = phantoms[position].layer.slots.bank_SN
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        places = [node for node in gm.graph.nodes if node.target in ops.PLACES]
        placed = [nodes.index(node.args[-1]) for node in places]
        sizes = {ops.pairs_of(node) for node in places}
        recorded = bool(on_gpu and placed) and inner is run_inductor and can_be_recorded(gm.graph)
        recorded = recorded and not _needs_host(gm.graph) and all(is_static(nodes[i]) for i in banked)
        if recorded:
            with both_kinds_together():
                compiled = run_inductor(gm, inputs, **CUDA_GRAPH, **small_kernels())
        else:
            compiled = inner(gm, inputs)

        @_counted
        def call(*args: Any) -> Any:
            served = list(args)
            for position in banked:
                served[position] = args[position].layer.slots.bank_SN
            if placed:
                args[placed[0]].layer.take_over(sizes)
            if not recorded:
                return compiled(*served)
            return launch(lambda: copy_outputs(compiled(*served)), served[placed[0]].device)

        return call

    return backend


_ran = 0


def count_runs() -> int:
    """How many graphs have run so far, of all models."""
    return _ran


def _counted(run: Compiled) -> Compiled:
    def call(*args: Any) -> Any:
        global _ran
        _ran += 1
        return run(*args)

    return call


def joins_gates(inner: Inner) -> bool:
    """Whether nothing is rounded between a product and its gate: not by Inductor, but by the code as it is."""
    return inner is run_inductor


def is_on_gpu(bank_SN: Tensor) -> bool:
    return bank_SN.is_cuda


def _needs_host(graph: Graph) -> bool:
    """Whether some op of `graph` needs the host: such a graph cannot be recorded whole."""
    return any(torch.Tag.cudagraph_unsafe in getattr(node.target, "tags", ()) for node in graph.nodes)


def rewrite_graph(
    gm: GraphModule, phantoms: dict[int, Phantom], pipeline: Callable[..., list[passes.Pass]]
) -> tuple[list[passes.Report], list[int]]:
    """Rewrite `gm` in place; return what each pass did and which inputs must now be banks.

    Raises `UnsupportedModelError`, naming the module, if any phantom is left with a use: never a wrong answer.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    weights: dict[Node, passes.Weight] = {}
    banks: dict[Hashable, passes.Bank] = {}
    for position, phantom in phantoms.items():
        layer = phantom.layer
        if phantom.dtype != phantom.field.dtype:
            raise OffloadError(
                f"{layer.moe.name}: its {phantom.field.name} is {phantom.dtype}, but was offloaded as "
                f"{phantom.field.dtype}; "
                "convert the model before optimize(), not after"
            )
        name = layer.moe.name
        weights[placeholders[position]] = passes.Weight(name, phantom.field.name, layer.moe.num_experts)
        banks[name] = bank_of(layer)
    passes.erase_unserved(gm.graph)
    try:
        sites = passes.find_sites(gm.graph, weights)
        reports = passes.run_passes(gm.graph, pipeline(sites, banks))
    except passes.UnknownUse as error:
        modules = next(one.layer.moe.modules for one in phantoms.values() if one.layer.moe.name == error.layer)
        raise UnsupportedModelError(f"{error}; {explain_refusal(modules)}") from error
    banked = {site.bank: phantoms[placeholders.index(site.bank)].layer for site in sites}
    _check_nothing_left(weights, banked)
    fake_mode = torch._guards.TracingContext.get().fake_mode
    for node, layer in banked.items():
        if fake_mode is not None:
            node.meta["example_value"] = fake_mode.from_tensor(layer.slots.bank_SN, static_shapes=True)
    gm.recompile()
    for report in reports:
        logger.debug(
            "%s: %d sites, %s, %.1f ms", report.name, len(report.layers), report.change, report.elapsed_s * 1e3
        )
    return reports, [placeholders.index(node) for node in banked]


def _check_nothing_left(weights: dict[Node, passes.Weight], banked: Iterable[Node]) -> None:
    banked = set(banked)
    for node, weight in weights.items():
        if node.users and node not in banked:
            raise UnsupportedModelError(
                f"{weight.layer}: after the rewrite the graph still uses {weight.field!r} in "
                f"{next(iter(node.users)).format_node()}; refusing to run it on weights that are not there"
            )


def run_graph(gm: GraphModule, example_inputs: list[Any]) -> Compiled:
    """Run the rewritten graph as it is: the unmodified model's own kernels, no compiler needed."""
    return _code_of(gm)


def run_inductor(gm: GraphModule, example_inputs: list[Any], **options: Any) -> Compiled:
    """Compile the rewritten graph with Inductor; `options` are its settings."""
    from torch._inductor.compile_fx import compile_fx

    progress.name_stage("Inductor")
    return cast(Compiled, compile_fx(gm, example_inputs, config_patches=options or None))


def core_as_is(core: GraphModule) -> Compiled:
    return _code_of(core)


def _code_of(gm: GraphModule) -> Compiled:
    """The Python code of a graph, to be called instead of the module: global hooks must not be called for it.

    Dynamo's graph modules write that code when they are first called, so it is made now.
    """
    _LazyGraphModule.force_recompile(gm)
    code: Compiled = gm.forward
    return code


def core_inductor(core: GraphModule) -> Compiled:
    """Compile a core once for every wave size, so that a wave rounds as the unmodified compiled graph does."""
    compiled: Compiled = torch.compile(core, backend="inductor", dynamic=True)
    return compiled
