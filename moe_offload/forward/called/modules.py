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

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...experts import members_of
from ...runtime.layer import LayerRuntime
from ..binding import Scope
from ..dynamo import never_traced
from ..inference_only import needs_gradients, refuse_backward_of
from .phantom import CalledPhantom
from .slots import SlotWeights, tensors_in

Swap = tuple[dict[str, Any], str]  # whose `_parameters`, and the name there: a field of the row, in its order


def serve_modules(layer: LayerRuntime, scope: Scope) -> SlotWeights:
    """Let the experts of `layer` run on its slots. Returns what holds views of them."""
    weights, fields = SlotWeights(layer), layer.moe.unpacked.fields
    for e, expert in list(members_of(layer.moe)):
        inside = {id(module) for module in expert.modules()}
        places = [p for own in layer.moe.places for p in own if p.expert == e and id(p.module) in inside]
        by_field = {place.field: place for place in places}
        swaps: list[Swap] = []
        phantoms = []
        for field in fields:
            place = by_field[field.name]
            phantom = CalledPhantom.of(place, layer.moe.name, field, layer.device)
            weights.keep_phantom(place.module._parameters, place.attribute, phantom)
            swaps.append((place.module._parameters, place.attribute))
            phantoms.append(phantom)
        run = _runs_on_slots(e, weights, expert.forward, swaps, phantoms)
        expert.__dict__["forward"] = _in_scope(layer.moe.name, expert, run, scope)
    return weights


def _in_scope(name: str, expert: nn.Module, run: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
    """`run` in a call of the model, or in one of its own where somebody calls a part of the model."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if scope.is_entered:
            return run(args, kwargs)
        scope.wait_for_turn(name)
        cut = needs_gradients(expert, (*args, *kwargs.values()))
        with scope.entered():
            output = run(args, kwargs)
        return refuse_backward_of(output) if cut else output

    return never_traced(forward)  # traced, a view of a slot would become a constant of a graph


def _runs_on_slots(
    e: int,
    weights: SlotWeights,
    forward: Callable[..., Any],
    swaps: Sequence[Swap],
    phantoms: Sequence[CalledPhantom],
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """`forward` of expert `e` with its row resident. Every line of it is paid for in each call."""
    calls = weights.calls

    def run_on(slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        views = weights.views(slot)
        for (parameters, name), phantom in zip(swaps, phantoms):  # noqa: B905
            if parameters.get(name) is not phantom:
                refuse_replaced(phantom)
        try:
            for i, (parameters, name) in enumerate(swaps):  # no variable holds a view when it is done
                parameters[name] = views[i]
            output = forward(*args, **kwargs)
        finally:
            for (parameters, name), phantom in zip(swaps, phantoms):  # noqa: B905
                parameters[name] = phantom
        if not weights.are_untouched(views):
            output = weights.release(output)
            weights.refuse_changes(views)
        return output

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if e in calls.in_use:  # it calls itself: its weights are in place, until the first call ends
            return forward(*args, **kwargs)
        rows = rows_of(args, kwargs)
        if rows == 0:
            output = run_on(0, args, kwargs)
            found = tensors_in(output)
            if found and not any(x.numel() for x in found):
                return output
        slot = calls.begin(e, rows)
        try:
            return run_on(slot, args, kwargs)
        finally:
            calls.end()

    return run


def refuse_replaced(phantom: CalledPhantom) -> NoReturn:
    raise UnsupportedModelError(
        f"{phantom.called}: another tensor has taken its place since the model was offloaded (an assignment, or "
        "torch.func.functional_call), which would not be computed with: weights of experts come from their slots. "
        "Replace it before optimize()"
    )


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows of hidden states an expert is called with: what its use is counted as."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor) or not x.dim():
        return 1
    n = x.numel()
    return n // x.size(-1) if n else 0
