"""The form "modules": an expert runs its own forward while its row is in a slot.

    expert(x)      its parameters are phantoms
      begin        its row becomes resident: a slot
      swap         views of the slot into the modules' `_parameters`
      forward      the expert's own
      finally      the phantoms are back

The loop around the experts is not touched, nor known. An input without rows reads nothing: there is nothing to compute,
so the weights may be anybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...experts import members_of
from ...runtime.layer import LayerRuntime
from ..binding import Scope
from ..inference_only import needs_gradients, refuse_backward_of
from .phantom import CalledPhantom
from .slots import SlotWeights, tensors_in

Swap = tuple[dict[str, Any], str, str, nn.Parameter]  # whose `_parameters`, the name there, the field, the phantom


def serve_modules(layer: LayerRuntime, scope: Scope) -> SlotWeights:
    """Let the experts of `layer` run on its slots. Returns what holds views of them."""
    weights, fields = SlotWeights(layer), {field.name: field for field in layer.moe.unpacked.fields}
    for e, expert in list(members_of(layer.moe)):
        places = [place for places in layer.moe.places for place in places if place.expert == e]
        inside = {id(module) for module in expert.modules()}
        swaps: list[Swap] = []
        for place in {(id(p.module), p.attribute): p for p in places if id(p.module) in inside}.values():
            phantom = CalledPhantom.of(place, layer.moe.name, fields[place.field], layer.device)
            place.module._parameters[place.attribute] = phantom
            swaps.append((place.module._parameters, place.attribute, place.field, phantom))
        run = _Expert(e, layer, weights, expert.forward, swaps).run
        expert.__dict__["forward"] = torch._dynamo.disable(_in_scope(expert, run, scope))
    return weights


def _in_scope(expert: nn.Module, run: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
    """`run` in a call of the model, or in one of its own where somebody calls a part of the model."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if scope.is_entered:
            return run(*args, **kwargs)
        cut = needs_gradients(expert, (*args, *kwargs.values()))
        with scope.entered():
            output = run(*args, **kwargs)
        return refuse_backward_of(output) if cut else output

    return forward


class _Expert:
    """One expert of a layer, as a module of it."""

    def __init__(
        self, e: int, layer: LayerRuntime, weights: SlotWeights, forward: Callable[..., Any], swaps: list[Swap]
    ):
        self.e, self.name, self.calls, self.weights = e, layer.moe.name, weights.calls, weights
        self.forward, self.swaps = forward, swaps

    def run(self, *args: Any, **kwargs: Any) -> Any:
        rows = rows_of(args, kwargs)
        if rows == 0:
            output = self._run_on(0, args, kwargs)
            found = tensors_in(output)
            if found and not any(x.numel() for x in found):
                return output
        slot = self.calls.begin(self.e, rows)
        try:
            return self._run_on(slot, args, kwargs)
        finally:
            self.calls.end()

    def _run_on(self, slot: int, args: Any, kwargs: Any) -> Any:
        weights, swaps = self.weights, self.swaps
        views = weights.of(slot)
        before = weights.state(views)
        for parameters, name, field, _ in swaps:
            parameters[name] = views[field]
        try:
            output = self.forward(*args, **kwargs)
        finally:
            for parameters, name, _, phantom in swaps:
                parameters[name] = phantom
        if weights.state(views) != before:
            output = weights.release(output)
            weights.refuse_changes(before, views, self.name)
        return output


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows of hidden states an expert is called with: what its use is counted as."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor) or not x.dim():
        return 1
    n = x.numel()
    return n // x.shape[-1] if n else 0
