"""The forms in which models hold their experts, and `find_experts`, which asks each of them.

To add one: a function that finds its layers and touches nothing, a line in `FORMS`; and, for a form whose experts are
`called`, what serves it, a line in `forward/called/table.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from ..errors import OffloadError, UnsupportedModelError
from .interface import find_interface
from .layer import MoELayer
from .layout import FIELD_ALIGN
from .lists import find_lists
from .masked import find_masked
from .modules import find_modules
from .none import explain_none
from .stacks import find_stacks

#: `{form: the layers of a model that are of it}`. None finds what another one finds.
FORMS: dict[str, Callable[[nn.Module], list[MoELayer]]] = {
    "interface": find_interface,  # seen in a graph, which the passes rewrite
    "masked": find_masked,  # the same, where each expert is handed all tokens, most of them zeros
    "modules": find_modules,  # called one by one
    "stacks": find_stacks,  # read one by one, by a number
    "lists": find_lists,  # the same, where each weight is a parameter of its own
}


def find_experts(model: nn.Module) -> list[MoELayer]:
    """Every layer of routed experts of `model`, in order, one `MoELayer` per distinct set of parameters.

    Raises `UnsupportedModelError`, naming the module, when there is none, or when one cannot be run exactly; and
    `OffloadError` for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise OffloadError(
            f"expected a model that is loaded, found {type(model).__name__}; from_pretrained() loads one by its folder "
            "or name"
        )
    refuse_offloaded(model)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    found = [layer for find in FORMS.values() for layer in find(model)]
    if not found:
        raise UnsupportedModelError(explain_none(model))
    found.sort(key=lambda layer: order[layer.name])
    for layer in found:
        empty = [field for field in layer.unpacked.fields if not field.nbytes]
        if empty:
            raise UnsupportedModelError(
                f"{layer.name}: its {empty[0].name} is {list(empty[0].shape)} for each expert, which holds no number; "
                "the model's configuration is damaged"
            )
    return [_beginning_as_loaded(replace(layer, index=i)) for i, layer in enumerate(found)]


def _beginning_as_loaded(moe: MoELayer) -> MoELayer:
    """The same, with rows whose fields begin as far from a cache line as they do in the model."""
    fields = moe.unpacked.fields
    if not any(field.is_placed for field in fields):
        return moe
    held = [moe.expert(e) for e in range(moe.num_experts)]
    if any(tensor.device.type != "cpu" for tensors in held for tensor in tensors.values()):
        return moe
    begins_E = [
        tuple(
            tensors[field.name].data_ptr() % FIELD_ALIGN if field.is_placed and field.name in tensors else 0
            for field in fields
        )
        for tensors in held
    ]
    return moe.beginning(begins_E)


def refuse_offloaded(model: nn.Module) -> None:
    """Raise `OffloadError` for a model that has experts whose weights are phantoms already."""
    for name, module in model.named_modules():
        if hasattr(module, "_moe_offload"):
            raise OffloadError(
                f"{name} is already offloaded, by optimize() of this model or of one that shares its modules; use "
                "that model's handle (model.moe_offload), or load the model again"
            )
