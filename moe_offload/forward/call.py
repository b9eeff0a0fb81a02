"""What `model(...)` runs once the model is offloaded: one forward at a time, compiled by our backend, inference only.

What would compute on the phantoms left in place of the expert weights, or move them, is refused here by name.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..cache.phase import is_decode
from ..errors import OffloadError
from ..plan.prefill import PrefillRoom
from ..runtime.model import Runtime
from .advise import Advisor
from .batch_sizes import find_cache, find_inputs
from .binding import Scope
from .dynamo import with_own_code
from .graphs.cuda_graphs import StaticCaches
from .inference_only import needs_gradients, refuse_backward_of
from .out_of_memory.retry import Retry

logger = logging.getLogger("moe_offload")

ADAPTED = (
    "an adapter changes the weights of offloaded experts (peft's target_parameters, which it also derives from "
    "target_modules that name projections of experts), but they rest in files and pass through slots. Adapt dense "
    "layers only (such as target_modules=['q_proj', 'v_proj']), or merge the adapter into the model before optimize()"
)


WRITTEN = (
    "the weights of experts were written to after optimize() (through .data), but they rest in files and pass through "
    "slots, so it would have no effect. Change them before optimize(), or load the model again and assign a Parameter "
    "of your own to the experts module"
)


class Call:
    """What `model(...)` runs: one forward at a time, without gradients, in the scope of the model (`binding.Scope`)."""

    def __init__(
        self, model: nn.Module, runtime: Runtime, scope: Scope, run: Retry, advisor: Advisor, room: PrefillRoom
    ):
        self.model, self.runtime, self.scope, self.run = model, runtime, scope, run
        self.advisor, self.room = advisor, room
        self.places = [
            (model.get_submodule(name.rpartition(".")[0])._modules, name.rpartition(".")[2], module)
            for layer in runtime.layers
            for name, module in zip(layer.moe.names, layer.moe.modules, strict=True)
            if not layer.moe.called  # there an adapter in an expert sees the real weights
        ]
        self.phantoms = [
            (module._parameters, name, phantom, phantom.data_ptr())
            for *_, module in self.places
            for name, phantom in module._parameters.items()
            if isinstance(phantom, nn.Parameter) and hasattr(phantom, "field")
        ]
        rows = {at: phantom.detach()[0] for *_, phantom, at in self.phantoms if phantom.device.type == "cpu"}
        seen = [row.flatten().view(torch.uint8).numpy() for row in rows.values()]  # no mode of the user's hears of it
        self.ends = [(end, end.tobytes()) for row in seen for end in (row[:8], row[-8:])]
        graphed = [layer for layer in runtime.layers if layer.moe.form == "interface"]
        modules = [(module, layer.moe.name) for layer in graphed for module in layer.moe.modules]
        self.configs = {
            id(vars(module.config)): (vars(module.config), module.config._experts_implementation_internal, name)
            for module, name in modules
        }
        self.static_caches = StaticCaches()
        self.warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # inside somebody else's torch.compile: the marker op is traced
            return self.model._call_impl(*args, **kwargs)
        if self.model.training and torch.is_grad_enabled():
            raise OffloadError(
                f"{type(self.model).__name__} was called in training mode; an offloaded model is for inference only. "
                "Call model.eval(), or train the model before optimize()"
            )
        cut = needs_gradients(self.model, (*args, *kwargs.values()))
        output = self._run(args, kwargs)
        return refuse_backward_of(output) if cut else output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sequences, tokens = _size(args, kwargs)
        meeting = self.scope.meeting
        if meeting is not None:
            meeting.before_forward(tokens)
        with self.scope.entered():
            self._check_implementation()
            self._check_places()
            self._check_phantoms()
            self._check_capture()
            if tokens > 1:
                self._check_length(sequences, tokens)
            decode = is_decode(tokens, begun=tokens > 1 or _has_begun(args, kwargs))
            self.advisor.begins(decode)
            if self.runtime.device_caches is not None:
                self.static_caches.mark(find_cache(kwargs))
            begun_s = time.perf_counter()
            if self.runtime.recorder is not None:
                self.runtime.recorder.begin_forward(decode)
            try:
                output = self.run(sequences, tokens, args, kwargs)
                self.runtime.end_step()
                calls = 1 if meeting is None else meeting.crowd()  # that this time was shared by
                self.advisor.ended(decode, (time.perf_counter() - begun_s) / calls)
                return output
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if isinstance(error.inner_exception, OffloadError):  # an error of ours, which Dynamo has wrapped
                    raise error.inner_exception from None
                self._explain_capture(error)
                raise
            except RuntimeError as error:
                self._explain_capture(error)
                raise
            finally:
                self.runtime.end_events()
                if self.runtime.recorder is not None:
                    self.runtime.recorder.end_forward()
                if self.runtime.timeline is not None:
                    self.runtime.timeline.forward(begun_s, sequences, tokens, decode)

    def _check_length(self, sequences: int, tokens: int) -> None:
        """Say once that activations may take more than the reserve has."""
        most = self.room.most_tokens(tokens, sequences)
        if tokens > most and not self.warned:
            self.warned = True
            logger.warning(
                "a forward of %d tokens: the budget has room for the activations of %d at a time, and may be "
                "exceeded. generate() reads a prompt in pieces by itself; model(...) is handed one after the other, "
                "each with the past_key_values of the one before",
                sequences * tokens, sequences * most,
            )  # fmt: skip

    def _check_places(self) -> None:
        """Refuse adapters on experts: peft wraps the module, and would add its delta to phantoms."""
        if any(children.get(name) is not module for children, name, module in self.places):
            raise OffloadError(ADAPTED)

    def _check_phantoms(self) -> None:
        """Refuse what was written to experts through `data`, of which torch counts no version: it would have no effect.
        All of a row is written, where any of it is: its experts are views of one."""
        with torch._C.DisableTorchFunction():
            moved = any(held.get(name) is one and one.data_ptr() != at for held, name, one, at in self.phantoms)
        if moved or any(end.tobytes() != was for end, was in self.ends):
            raise OffloadError(WRITTEN)

    def _check_capture(self) -> None:
        """Refuse a CUDA graph captured around a model that has decoded nothing yet: the compiler would fail in it."""
        first, caches = self.runtime.layers[0], self.runtime.device_caches
        if caches is None or not caches.in_charge:
            first.arrivals.transfer.refuse_capture(first.moe.name)

    def _explain_capture(self, error: RuntimeError) -> None:
        """Raise our refusal in place of an error of torch that a captured graph is the reason of: what was about to be
        compiled saves the state of the GPU's random numbers, which no capture allows."""
        if "captur" in str(error) and not isinstance(error, OffloadError):
            first = self.runtime.layers[0]
            first.arrivals.transfer.refuse_capture(first.moe.name)

    def _check_implementation(self) -> None:
        """Refuse an experts implementation that was set after `optimize`: it would have no effect."""
        for config, before, name in self.configs.values():
            if config["_experts_implementation_internal"] != before:
                raise OffloadError(
                    f"{name}: its experts implementation was set to {config['_experts_implementation_internal']!r} "
                    "after optimize(), which cannot reach the offloaded weights; choose it with "
                    "config={'experts_implementation': ...}"
                )


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """How many sequences a forward is given, and of how many tokens each."""
    sizes = [x.shape[:2] for x in find_inputs(args, kwargs)]
    *sequences, tokens = max(sizes, key=torch.Size.numel, default=(0, 0))
    return math.prod(sequences), tokens


def _has_begun(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the forward is given a KV cache that holds tokens. Yes, where the cache does not say."""
    cache: Any = find_cache(kwargs)
    if cache is None:
        cache = next((one for one in args if hasattr(one, "get_seq_length")), None)
    if not hasattr(cache, "get_seq_length"):  # none, or tuples of tensors, as code for transformers 4 has them
        return bool(cache)
    try:
        length = cache.get_seq_length()
    except ValueError:  # of linear attention alone, which counts no tokens
        return bool(cache.has_previous_state())
    # A device is not asked how many there are: the host would wait for it.
    return length.device.type != "cpu" or bool(length > 0) if isinstance(length, torch.Tensor) else length > 0


def whole_call(model: nn.Module) -> Callable[..., Any]:
    """A function to compile as the model's whole call. All modules share the code of `_call_impl`, and Dynamo keeps
    graphs by code: so each model gets a function of its own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    return with_own_code(call, "call")
