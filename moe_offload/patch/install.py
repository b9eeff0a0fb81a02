"""Patch a model in place: phantoms for its expert weights, our experts implementation, a compiled call.

The model keeps its class, its `forward` and its `generate`. What changes:

    module.gate_up_proj ...         a Phantom; state_dict() still returns the real rows (saving.py)
    config._experts_implementation  "moe_offload_grouped_mm" or "moe_offload_batched_mm", on every experts module
    model(...)                      compiled by our backend, under the model's lock, inference only (call.py)
    model.to(...), copies ...       refused where they would reach the experts (refusals.py)

Traced by our backend, the experts implementation is transformers' own code, for the passes to rewrite. Anywhere else
(an eager call to a submodule, somebody else's torch.compile, the far side of a graph break) it is one op that streams
and computes by itself: what the passes never see is slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import OffloadError
from ..experts import MoELayer
from ..forward import backend
from ..forward.advise import Advisor
from ..forward.binding import Link, Scope, connect, disconnect
from ..forward.call import ADAPTED, Call, own_code
from ..forward.retry import Retry
from ..runtime.kernels import KERNELS
from ..runtime.layer import LayerRuntime
from ..runtime.model import Runtime
from .footprint import count_what_is_held

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


class ModuleCore:
    """transformers' own experts code, run for single pairs (K = 1) on the rows of a bank.

    Routing weights of one leave the pairs unweighted: the weighted sum over K is taken after all waves.
    """

    def __init__(self, moe: MoELayer, implementation: str, views: Callable[[Tensor], dict[str, Tensor]]):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        self.module, self.views = moe.modules[0], views
        self.run = ALL_EXPERTS_FUNCTIONS[implementation]

    def __call__(
        self,
        x_P: Tensor,
        slots_R: Tensor,
        bank_SN: Tensor,
        others: Sequence[Tensor],
        pairs_R: Tensor | slice | None = None,
    ) -> Tensor:
        if pairs_R is not None:
            x_P = x_P[pairs_R]
        views = self.views(bank_SN)
        bare = object.__new__(type(self.module))
        bare.__dict__.update(self.module.__dict__)
        bare.__dict__["_parameters"] = {**self.module._parameters, **views}
        bare.__dict__["num_experts"] = bank_SN.shape[0]
        dtype = next(iter(views.values())).dtype
        ones = torch.ones((len(x_P), 1), dtype=dtype, device=x_P.device)
        out: Tensor = self.run(bare, x_P.to(dtype), slots_R.view(-1, 1), ones)
        return out


def serve_products(device: str) -> None:
    """Matrix products by the kernels of `device`."""
    kernels = KERNELS[device.partition(":")[0]]()
    backend.serve_products(kernels.indexed_mm, kernels.grouped_mm)


def choose_implementation(moe_layers: Sequence[MoELayer], wanted: str) -> str:
    """'auto' keeps the model's own choice where the passes can see it, else grouped_mm."""
    if wanted in IMPLEMENTATIONS:
        return wanted
    own: set[str] = {moe.modules[0].config._experts_implementation for moe in moe_layers}
    return own.pop() if len(own) == 1 and own <= set(IMPLEMENTATIONS) else "grouped_mm"


def install(
    model: nn.Module,
    runtime: Runtime,
    *,
    implementation: str,
    inner: str,
    overlap: bool,
    guess: bool,
    dynamic: bool | None,
    fullgraph: bool,
    advisor: Advisor,
) -> list[Any]:
    """Patch `model` to run on `runtime`. Returns the list to which each compiled graph's pass reports are added."""
    _register_implementations()
    scope = Scope()
    nan_rows: dict[Hashable, Tensor] = {}
    for layer in runtime.layers:
        _install_layer(layer, scope, implementation, nan_rows)
    log: list[Any] = []
    run, core = (
        (backend.run_inductor, backend.core_inductor)
        if inner == "inductor"
        else (backend.run_graph, backend.core_as_is)
    )
    made = backend.make_backend(run, core, log, overlap, guess)

    def compile() -> Callable[..., Any]:
        run: Callable[..., Any] = torch.compile(own_code(model), backend=made, dynamic=dynamic, fullgraph=fullgraph)
        return run

    model._compiled_call_impl = Call(model, runtime, scope, Retry(runtime, scope, compile), advisor)
    # On some devices generate() compiles its decode steps itself, and would trace the op of last resort.
    model.__dict__["get_compiled_call"] = lambda compile_config: model.__call__
    count_what_is_held(model, runtime)
    return log


def uninstall(runtime: Runtime) -> None:
    """Let go of the banks; the model stays refused (its weights are gone), but holds no memory."""
    for layer in runtime.layers:
        disconnect(layer)


def _install_layer(layer: LayerRuntime, scope: Scope, implementation: str, nan_rows: dict[Hashable, Tensor]) -> None:
    moe = layer.moe
    layer.module_core = ModuleCore(moe, implementation, backend.bank_of(layer).views)
    phantoms = {f.name: backend.Phantom.of(layer, f, nan_rows) for f in moe.layout.fields}
    for module in moe.modules:
        for name, phantom in phantoms.items():
            setattr(module, name, phantom)
        module._moe_offload = Link(scope, layer.slots.bank_SN)
        # On the module's own config: it may be a copy that model.set_experts_implementation() never reaches.
        module.config._experts_implementation_internal = f"moe_offload_{implementation}"
    connect(layer)


def _register_implementations() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name in IMPLEMENTATIONS:
        if f"moe_offload_{name}" not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(f"moe_offload_{name}", _implementation(ALL_EXPERTS_FUNCTIONS[name]))


def _implementation(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hasattr(self, "parametrizations"):
            raise OffloadError(ADAPTED)
        scope = self._moe_offload.scope
        if torch.compiler.is_compiling() and scope.active and scope.banks:
            return original(self, hidden_states, top_k_index, top_k_weights)
        bank_SN = self._moe_offload.bank_SN
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            apply: Any = _InferenceOnly.apply
            return cast(Tensor, apply(hidden_states, top_k_index, top_k_weights, bank_SN))
        return backend.experts_op(hidden_states, top_k_index, top_k_weights, bank_SN)

    return experts


class _InferenceOnly(torch.autograd.Function):
    """The marker op for callers with gradients enabled: forward as usual, and a backward that says why not."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank_SN: Tensor) -> Tensor:
        return backend.experts_op(x_TH, ids_TK, weights_TK, bank_SN)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise OffloadError("an offloaded model is for inference only: its experts have no gradients")
