"""Patch a model in place: phantoms for its expert weights, our experts implementation, a compiled call.

The model keeps its class, its `forward` and its `generate`. What changes:

    module.gate_up_proj ...         a Phantom; state_dict() still returns the real rows (saving/)
    experts[3](x)                   where the model's code calls its experts one by one: served by forward/called/, and
                                    nothing is compiled around them
    module.config                   a view that names our experts implementation (experts_config.py)
    model(...)                      under the model's lock, inference only (call.py); its experts compiled, or all of it
    model.to(...), copies ...       refused where they would reach the experts (refusals.py)

Traced by our backend, the experts implementation is transformers' own code, for the passes to rewrite. Anywhere else
(an eager call to a submodule, a torch.compile of the user's own, code after a graph break) it is one op that streams
and computes by itself: slower, never wrong.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import OffloadError
from ..experts import MoELayer
from ..forward import masked
from ..forward.advise import Advisor
from ..forward.binding import (
    Link,
    RunExperts,
    Scope,
    banks_of_this_thread,
    connect_bank,
    disconnect_bank,
    is_cast,
    run_op,
    run_untraced,
)
from ..forward.call import ADAPTED, Call, whole_call
from ..forward.called.hints import hint_from_routers
from ..forward.called.rows import keep_untraced
from ..forward.called.table import SERVED
from ..forward.dynamo import Settings
from ..forward.graphs import compiling, ops, products
from ..forward.graphs.kv_pool import KVPool
from ..forward.graphs.masked import MaskedModuleCore
from ..forward.graphs.phantom import Phantom
from ..forward.graphs.recordings import forget_recordings
from ..forward.inference_only import refuse_backward
from ..forward.out_of_memory.retry import Retry
from ..forward.regions import Regions, make_region
from ..plan.prefill import PrefillRoom
from ..runtime.kernels import KERNELS
from ..runtime.layer import LayerRuntime
from ..runtime.model import Runtime
from ..runtime.waves_cpu import RunCore
from .experts_config import experts_view
from .footprint import count_what_is_held
from .generation.compiled_call import keep_compiled_call
from .generation.long_prompts import read_in_pieces
from .generation.static_cache import keep_static_caches
from .module_core import ModuleCore, original_code

logger = logging.getLogger("moe_offload")
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


def serve_products(device: str) -> None:
    """Matrix products by the kernels of `device`."""
    products.serve_products(KERNELS[device.partition(":")[0]]())


def choose_implementation(moe_layers: Sequence[MoELayer], wanted: str, device: str = "cpu") -> str:
    """'auto' keeps the model's own choice where the passes can see it, else grouped_mm. On a GPU, where batched_mm
    would copy a matrix for each pair, it is always grouped_mm."""
    if wanted in IMPLEMENTATIONS:
        return wanted
    if device != "cpu":
        return "grouped_mm"
    own: set[str] = {moe.modules[0].config._experts_implementation for moe in moe_layers if moe.form == "interface"}
    return own.pop() if len(own) == 1 and own <= set(IMPLEMENTATIONS) else "grouped_mm"


def patch_model(
    model: nn.Module,
    runtime: Runtime,
    *,
    implementation: str,
    inner: str,
    overlap: bool,
    guess: bool,
    dynamic: bool | None,
    fullgraph: bool,
    few_tokens: int,
    advisor: Advisor,
    room: PrefillRoom,
    static_tokens: int | None = None,
) -> list[Any]:
    """Patch `model` to run on `runtime`. Returns the list to which each compiled graph's pass reports are added.

    `room` is what the plan keeps free for the activations of a prompt. Products of up to `few_tokens` may round
    otherwise than the model's own. Where decode steps are CUDA graphs, `static_tokens` is how long a static KV cache
    the plan has room for.
    """
    _register_implementations()
    log: list[Any] = []
    run, core = (
        (compiling.run_inductor, compiling.core_inductor)
        if inner == "inductor"
        else (compiling.run_graph, compiling.core_as_is)
    )
    made = compiling.make_backend(run, core, log, overlap, guess, few_tokens)

    called = [layer for layer in runtime.layers if layer.moe.called]
    graphed = [layer for layer in runtime.layers if not layer.moe.called]
    whole = not called and (inner == "inductor" or guess or fullgraph or runtime.device_caches is not None)
    if called and (inner == "inductor" or fullgraph):
        logger.warning(
            "%s: the model's own code calls its experts one by one, where nothing can be compiled: compile='inductor' "
            "and fullgraph have no effect",
            called[0].moe.name,
        )  # fmt: skip
    traced = [model] if whole else [module for layer in graphed for module in layer.moe.modules]
    scope = Scope(runtime, Settings(traced, log))
    codes: dict[str, tuple[Callable[[], RunExperts], RunExperts]] = {
        "interface": (partial(make_region, original_code(implementation)), run_untraced),
        "masked": (masked.make_region, masked.run_untraced),
    }
    forms = [] if whole else dict.fromkeys(layer.moe.form for layer in graphed)
    meets = {
        "interface": overlap and runtime.layers[0].device.type == "cpu"
    }  # a masked layer is not told who asks for whom
    regions = {form: Regions(scope, *codes[form], made, log, dynamic, meets.get(form, False)) for form in forms}

    def compile(dynamic: bool | None = dynamic) -> Callable[..., Any]:
        for region in regions.values():
            region.renew()
        if not whole:
            return model._call_impl
        run: Callable[..., Any] = torch.compile(whole_call(model), backend=made, dynamic=dynamic, fullgraph=fullgraph)
        return run

    growing = partial(compile, True) if whole and dynamic is None else None

    nan_rows: dict[Hashable, Tensor] = {}
    _name_implementation(graphed, f"moe_offload_{implementation}")
    for layer in called:
        weights = SERVED[layer.moe.form](layer, scope)
        for module in layer.moe.modules:
            module._moe_offload = weights
        hint_from_routers(layer, scope, model)
        if layer.moe.form != "modules":
            keep_untraced(layer.moe, model)
    for layer in graphed:
        form = layer.moe.form
        run_eager = regions[form].run if regions else codes[form][1]
        if layer.moe.share is not None:
            run_eager = skip_where_none(layer, run_eager)
        # A CPU's autocast knows no grouped_mm.
        casts = form == "masked" or implementation != "grouped_mm" or layer.device.type != "cpu"
        link = Link(scope, run_eager, whole, ops.rows_of(layer), layer.moe.name, casts, inner == "inductor")
        _install_layer(layer, link, implementation, nan_rows)
    model._compiled_call_impl = Call(model, runtime, scope, Retry(runtime, scope, compile, growing), advisor, room)
    keep_compiled_call(model)
    read_in_pieces(model, room)
    if static_tokens is not None:
        pool = KVPool(2 * static_tokens, forget_recordings)
        scope.on_renewal(pool.drop)
        keep_static_caches(model, pool, static_tokens)
    # On some devices generate() swaps the experts implementation for its decode steps, which cannot reach ours.
    model.__dict__["_optimize_model_for_decode"] = contextlib.nullcontext
    count_what_is_held(model, runtime)
    return log


def unpatch_model(runtime: Runtime) -> None:
    """Free the banks. The model holds no memory then; calling it raises `ClosedError`, since its weights are gone."""
    for layer in runtime.layers:
        disconnect_bank(layer)


def _install_layer(layer: LayerRuntime, link: Link, implementation: str, nan_rows: dict[Hashable, Tensor]) -> None:
    moe = layer.moe
    views = ops.bank_of(layer).views
    is_masked = moe.form == "masked"
    core: RunCore = MaskedModuleCore(moe, views) if is_masked else ModuleCore(moe, implementation, views)
    layer.module_core, layer.sorts_pairs = core, implementation == "grouped_mm"
    phantoms = {f.name: Phantom.of(layer, f, nan_rows) for f in moe.unpacked.fields}
    for module in moe.modules:
        for name, phantom in phantoms.items():
            setattr(module, name, phantom)
        module._moe_offload = link
        if moe.share is not None:  # transformers' guards against ids of other processes are ours to keep: see stream()
            module._is_expert_parallel = False
        if is_masked:
            masked.replace_forward(module)
    connect_bank(layer)


def skip_where_none(layer: LayerRuntime, run: RunExperts) -> RunExperts:
    """`run`, but for a call in which no expert is one of this process: it gives zeros, and asks for nothing."""

    def run_where_any(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if layer.moe.has_any(ids_TK):
            return run(module, x_TH, ids_TK, weights_TK)
        layer.cache.counters.tokens += len(x_TH)
        return torch.zeros_like(x_TH)

    return run_where_any


def _name_implementation(layers: Sequence[LayerRuntime], name: str) -> None:
    """Each experts module gets a view of its own config: that may be a copy, which the model's never reaches."""
    views: dict[int, Any] = {}
    for module in (m for layer in layers for m in layer.moe.modules if layer.moe.form == "interface"):
        known = id(module.config)
        if known not in views:
            views[known] = experts_view(module.config, name)
        module.config = views[known]


def _register_implementations() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name in IMPLEMENTATIONS:
        if f"moe_offload_{name}" not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(f"moe_offload_{name}", _implementation(ALL_EXPERTS_FUNCTIONS[name]))


def _implementation(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hasattr(self, "parametrizations"):
            raise OffloadError(ADAPTED)
        link = self._moe_offload
        if torch.compiler.is_dynamo_compiling():  # this thread traces: the code here is not run
            if link.whole and link.scope.banks == banks_of_this_thread():
                if link.compiled and is_cast(link, hidden_states):
                    return run_op(self, hidden_states, top_k_index, top_k_weights)
                return original(self, hidden_states, ops.mark_unserved(top_k_index, link.rows), top_k_weights)
            return run_op(self, hidden_states, top_k_index, top_k_weights)
        if torch.is_grad_enabled():
            return cast(Tensor, refuse_backward(link.run, self, hidden_states, top_k_index, top_k_weights))
        return cast(Tensor, link.run(self, hidden_states, top_k_index, top_k_weights))

    return experts
