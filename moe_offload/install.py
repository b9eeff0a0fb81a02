"""Patch a model in place: phantoms for its expert weights, our experts implementation, a compiled call.

The model keeps its class, its `forward` and its `generate`. What changes:

    module.gate_up_proj ...         a Phantom; state_dict() still returns the real rows (saving.py)
    config._experts_implementation  "moe_offload_grouped_mm" or "moe_offload_batched_mm", on every experts module
    model(...)                      compiled by our backend, under the model's lock, inference only
    model.to(...), copies ...       refused where they would reach the experts (refusals.py)

Traced by our backend, the experts implementation is transformers' own code, for the passes to rewrite. Anywhere else
(an eager call to a submodule, somebody else's torch.compile, the far side of a graph break) it is one op that streams
and computes by itself: what the passes never see is slower, never wrong.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import backend
from .errors import OffloadError
from .experts import ExpertBank
from .measure import PROMPT_TOKENS
from .runtime import LayerRuntime, Runtime, closed

logger = logging.getLogger("moe_offload")

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
_ADAPTED = (
    "an adapter changes the weights of offloaded experts (peft's target_parameters, which it also derives from "
    "target_modules that name projections of experts), but they rest in files and pass through slots. Adapt dense "
    "layers only (such as target_modules=['q_proj', 'v_proj']), or merge the adapter into the model before optimize()."
)
_numbers = itertools.count()


class Scope:
    """Whether our own backend is running the model. One per model, written under its lock; Dynamo guards on it."""

    def __init__(self) -> None:
        self.active = False


class Link:
    """What an experts module needs to find its layer: the scope, and the bank the marker op is keyed by."""

    def __init__(self, scope: Scope, bank_SN: Tensor):
        self.scope, self.bank_SN = scope, bank_SN


class ModuleCore:
    """transformers' own experts code, run for single pairs (K = 1) on the rows of a bank.

    Routing weights of one leave the pairs unweighted: the weighted sum over K is taken after all waves.
    """

    def __init__(self, bank: ExpertBank, implementation: str, views: Callable[[Tensor], dict[str, Tensor]]):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        self.module, self.views = bank.modules[0], views
        self.run = ALL_EXPERTS_FUNCTIONS[implementation]

    def __call__(
        self,
        x_P: Tensor,
        slots: Tensor,
        bank_SN: Tensor,
        others: Sequence[Tensor],
        rows: Tensor | slice | None = None,
    ) -> Tensor:
        if rows is not None:
            x_P = x_P[rows]
        views = self.views(bank_SN)
        stand_in = object.__new__(type(self.module))
        stand_in.__dict__.update(self.module.__dict__)
        stand_in.__dict__["_parameters"] = {**self.module._parameters, **views}
        stand_in.__dict__["num_experts"] = bank_SN.shape[0]
        dtype = next(iter(views.values())).dtype
        ones = torch.ones((len(x_P), 1), dtype=dtype, device=x_P.device)
        out: Tensor = self.run(stand_in, x_P.to(dtype), slots.view(-1, 1), ones)
        return out


def choose_implementation(banks: Sequence[ExpertBank], wanted: str) -> str:
    """'auto' keeps the model's own choice where the passes can see it, else grouped_mm."""
    if wanted in IMPLEMENTATIONS:
        return wanted
    own: set[str] = {bank.modules[0].config._experts_implementation for bank in banks}
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
    compiled = torch.compile(own_code(model), backend=made, dynamic=dynamic, fullgraph=fullgraph)
    model._compiled_call_impl = _Call(model, runtime, scope, compiled)
    return log


class _Closed:
    """What the bank of a closed model is bound to: whatever a graph asks of it, the answer is `ClosedError`."""

    def __getattr__(self, verb: str) -> Any:
        raise closed("this model")


_CLOSED_BANK = torch.empty(1)
backend.bind(_CLOSED_BANK, _Closed())


def uninstall(runtime: Runtime) -> None:
    """Let go of the banks; the model stays refused (its weights are gone), but holds no memory."""
    for layer in runtime.layers:
        backend.unbind(layer.slots.bank_SN)
        for module in layer.bank.modules:
            module._moe_offload.bank_SN = _CLOSED_BANK


class _Call:
    """What `model(...)` runs: one forward at a time, without gradients, inside our scope."""

    def __init__(self, model: nn.Module, runtime: Runtime, scope: Scope, compiled: Callable[..., Any]):
        self.model, self.runtime, self.scope, self.compiled = model, runtime, scope, compiled
        modules = [(module, layer.bank.name) for layer in runtime.layers for module in layer.bank.modules]
        self.places = [
            (model.get_submodule(name.rpartition(".")[0])._modules, name.rpartition(".")[2], module)
            for layer in runtime.layers
            for name, module in zip(layer.bank.names, layer.bank.modules, strict=True)
        ]
        self.configs = {id(module.config): (module.config, name) for module, name in modules}
        self.warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside somebody else's torch.compile: the marker op is traced
            return self.model._call_impl(*args, **kwargs)
        if self.model.training and torch.is_grad_enabled():
            raise OffloadError(
                f"{type(self.model).__name__} was called in training mode; an offloaded model is for inference only. "
                f"Call "
                "model.eval(), or train the model before optimize()."
            )
        with self.runtime.lock, torch.no_grad():
            self.runtime.check_open()
            self._check_implementation()
            self._check_places()
            self._check_length(args, kwargs)
            self.scope.active = True
            try:
                return self.compiled(*args, **kwargs)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if isinstance(error.inner_exception, OffloadError):  # ours, in Dynamo's wrapping
                    raise error.inner_exception from None
                raise
            finally:
                self.scope.active = False

    def _check_length(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Say once that activations may take more than the reserve has."""
        given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        tokens = max((x.shape[:2].numel() for x in given if isinstance(x, Tensor)), default=0)
        if tokens > PROMPT_TOKENS and not self.warned:
            self.warned = True
            logger.warning(
                "a forward of %d tokens: the budget has room for the activations of %d at a time, and may be "
                "exceeded. generate(..., prefill_chunk_size=%d) reads a prompt in pieces",
                tokens, PROMPT_TOKENS, PROMPT_TOKENS,
            )  # fmt: skip

    def _check_places(self) -> None:
        """A wrapper of peft's around experts would be traced, and its delta added to phantoms."""
        if any(children.get(name) is not module for children, name, module in self.places):
            raise OffloadError(_ADAPTED)

    def _check_implementation(self) -> None:
        """Code other than ours would compute on phantoms: NaN, which an argmax turns into tokens."""
        for config, name in self.configs.values():
            if not str(config._experts_implementation).startswith("moe_offload_"):
                raise OffloadError(
                    f"{name}: its experts implementation was set to {config._experts_implementation!r} after "
                    "optimize(), which cannot reach the offloaded weights; choose it with "
                    "config={'experts_implementation': ...}"
                )


def own_code(model: nn.Module) -> Callable[..., Any]:
    """A function of its own that calls the model: Dynamo caches graphs, and counts recompilations, per code object,
    and all modules share that of `nn.Module._call_impl`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"moe_offload_call_{next(_numbers)}")
    return call


def _install_layer(layer: LayerRuntime, scope: Scope, implementation: str, nan_rows: dict[Hashable, Tensor]) -> None:
    bank = layer.bank
    layer.module_core = ModuleCore(bank, implementation, backend.bank_of(layer).views)
    backend.bind(layer.slots.bank_SN, layer)
    phantoms = {f.name: backend.Phantom.of(layer, f, nan_rows) for f in bank.layout.fields}
    for module in bank.modules:
        for name, phantom in phantoms.items():
            setattr(module, name, phantom)
        module._moe_offload = Link(scope, layer.slots.bank_SN)
        # On the module's own config: it may be a copy that model.set_experts_implementation() never reaches.
        module.config._experts_implementation_internal = f"moe_offload_{implementation}"


def _register_implementations() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name in IMPLEMENTATIONS:
        if f"moe_offload_{name}" not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(f"moe_offload_{name}", _implementation(ALL_EXPERTS_FUNCTIONS[name]))


def _implementation(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hasattr(self, "parametrizations"):
            raise OffloadError(_ADAPTED)
        if torch.compiler.is_compiling() and self._moe_offload.scope.active:
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
