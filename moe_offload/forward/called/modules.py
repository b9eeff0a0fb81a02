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
        expert.__dict__["forward"] = _runs_on_slots(e, expert, weights, swaps, phantoms, scope)
    return weights


def _runs_on_slots(
    e: int,
    expert: nn.Module,
    weights: SlotWeights,
    swaps: Sequence[Swap],
    phantoms: Sequence[CalledPhantom],
    scope: Scope,
) -> Callable[..., Any]:
    """The forward of `expert`, number `e`, with its row resident.

    Every line is paid for in each call, and a call of another function of ours costs as much as three of them: hence
    one long function, which looks at what is nearly always so by itself.
    """
    own, calls, in_use = expert.forward, weights.calls, weights.calls.in_use
    places = [(*swap, phantom, i) for i, (swap, phantom) in enumerate(zip(swaps, phantoms, strict=True))]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not scope.is_entered:
            return _run_alone(expert, weights.moe.name, scope, args, kwargs)
        if e in in_use:  # it calls itself: its weights are in place, until the first call ends
            return own(*args, **kwargs)
        x = args[0] if args else None
        rows = x.numel() // (x.size(-1) or 1) if type(x) is Tensor and x.dim() else rows_of(args, kwargs)
        if not rows:
            output = run_on(0, args, kwargs)
            if _is_empty(output):
                return output
        slot = calls.begin(e, rows)
        try:
            return run_on(slot, args, kwargs)
        finally:
            in_use.pop()

    def run_on(slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        views = weights.views(slot, e)
        for parameters, name, phantom, _ in places:
            if parameters.get(name) is not phantom:
                refuse_replaced(phantom)
        try:
            for parameters, name, _, i in places:  # no variable holds a view when it is done
                parameters[name] = views[i]
            output = own(*args, **kwargs)
        finally:
            for parameters, name, phantom, _ in places:
                parameters[name] = phantom
        if not weights.are_untouched(views):
            output = weights.release(output)
            weights.refuse_changes(views)
        return output

    return never_traced(forward)  # traced, a view of a slot would become a constant of a graph


def _run_alone(expert: nn.Module, name: str, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of an expert in a call of its own: somebody calls a part of the model."""
    scope.wait_for_turn(name)
    cut = needs_gradients(expert, (*args, *kwargs.values()))
    with scope.entered():
        output = expert.forward(*args, **kwargs)
    return refuse_backward_of(output) if cut else output


def _is_empty(output: Any) -> bool:
    """Whether `output` has tensors, and none of them an element."""
    found = tensors_in(output)
    return bool(found) and not any(x.numel() for x in found)


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
