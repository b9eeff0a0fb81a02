"""What `model(...)` runs once the model is offloaded: one forward at a time, compiled by our backend, inference only.

What would compute on the phantoms left in place of the expert weights, or move them, is refused here by name.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..cache.phase import is_decode
from ..errors import OffloadError
from ..observe import progress
from ..plan.weights import RESERVED_PROMPT_TOKENS
from ..runtime.model import Runtime
from .advise import Advisor
from .batch_sizes import given
from .binding import Scope
from .cuda_graphs import StaticCaches
from .retry import Retry

logger = logging.getLogger("moe_offload")

#: Silences Dynamo's warning about the lru_cache around transformers' check of torch's version, which is harmless here.
VERSIONS_ARE_CACHED = r"Dynamo detected a call to a `functools\.lru_cache`-wrapped function at 'moe\.py"
ADAPTED = (
    "an adapter changes the weights of offloaded experts (peft's target_parameters, which it also derives from "
    "target_modules that name projections of experts), but they rest in files and pass through slots. Adapt dense "
    "layers only (such as target_modules=['q_proj', 'v_proj']), or merge the adapter into the model before optimize()"
)
_numbers = itertools.count()


class Call:
    """What `model(...)` runs: one forward at a time, without gradients, inside our scope."""

    def __init__(self, model: nn.Module, runtime: Runtime, scope: Scope, run: Retry, advisor: Advisor):
        self.model, self.runtime, self.scope, self.run = model, runtime, scope, run
        self.advisor = advisor
        modules = [(module, layer.moe.name) for layer in runtime.layers for module in layer.moe.modules]
        self.places = [
            (model.get_submodule(name.rpartition(".")[0])._modules, name.rpartition(".")[2], module)
            for layer in runtime.layers
            for name, module in zip(layer.moe.names, layer.moe.modules, strict=True)
        ]
        self.configs = {id(module.config): (module.config, name) for module, name in modules}
        self.static_caches = StaticCaches()
        self.warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside somebody else's torch.compile: the marker op is traced
            return self.model._call_impl(*args, **kwargs)
        if self.model.training and torch.is_grad_enabled():
            raise OffloadError(
                f"{type(self.model).__name__} was called in training mode; an offloaded model is for inference only. "
                "Call model.eval(), or train the model before optimize()"
            )
        with self.runtime.lock, self.runtime.current(), torch.no_grad(), progress.compiling():
            self.runtime.check_open()
            self._check_implementation()
            self._check_places()
            sequences, tokens = _size(args, kwargs)
            self._check_length(sequences * tokens)
            self.advisor.begins(is_decode(tokens))
            if self.runtime.device_caches is not None:
                self.static_caches.mark(kwargs.get("past_key_values"))
            begun_s = time.perf_counter()
            if self.runtime.recorder is not None:
                self.runtime.recorder.begin_forward(is_decode(tokens))
            self.scope.active = True
            try:
                output = self.run(sequences, tokens, args, kwargs)
                self.runtime.check_ids()
                self.advisor.ended(is_decode(tokens), time.perf_counter() - begun_s)
                return output
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if isinstance(error.inner_exception, OffloadError):  # ours, in Dynamo's wrapping
                    raise error.inner_exception from None
                raise
            finally:
                self.scope.active = False
                if self.runtime.recorder is not None:
                    self.runtime.recorder.end_forward()
                if self.runtime.timeline is not None:
                    self.runtime.timeline.forward(begun_s, sequences, tokens)

    def _check_length(self, tokens: int) -> None:
        """Say once that activations may take more than the reserve has."""
        if tokens > RESERVED_PROMPT_TOKENS and not self.warned:
            self.warned = True
            logger.warning(
                "a forward of %d tokens: the budget has room for the activations of %d at a time, and may be "
                "exceeded. generate(..., prefill_chunk_size=%d) reads a prompt in pieces",
                tokens, RESERVED_PROMPT_TOKENS, RESERVED_PROMPT_TOKENS,
            )  # fmt: skip

    def _check_places(self) -> None:
        """A wrapper of peft's around experts would be traced, and its delta added to phantoms."""
        if any(children.get(name) is not module for children, name, module in self.places):
            raise OffloadError(ADAPTED)

    def _check_implementation(self) -> None:
        """Code other than ours would compute on phantoms: NaN, which an argmax turns into tokens."""
        for config, name in self.configs.values():
            if not str(config._experts_implementation).startswith("moe_offload_"):
                raise OffloadError(
                    f"{name}: its experts implementation was set to {config._experts_implementation!r} after "
                    "optimize(), which cannot reach the offloaded weights; choose it with "
                    "config={'experts_implementation': ...}"
                )


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """How many sequences a forward is given, and of how many tokens each."""
    sizes = [x.shape[:2] for x in given(args, kwargs)]
    *sequences, tokens = max(sizes, key=torch.Size.numel, default=(0, 0))
    return math.prod(sequences), tokens


def own_code(model: nn.Module) -> Callable[..., Any]:
    """A function of its own that calls the model: Dynamo caches graphs, and counts recompilations, per code object,
    and all modules share that of `nn.Module._call_impl`."""

    warnings.filterwarnings("ignore", VERSIONS_ARE_CACHED)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"moe_offload_call_{next(_numbers)}")
    return call
