"""Move dense weights to the one device that the model computes on. Rows of experts are moved by their cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..errors import UnsupportedModelError
from ..experts import MoELayer
from ..memory.devices import usable_kinds


def find_dense_device(model: Any, moe_layers: Sequence[MoELayer], untested: bool) -> str:
    """The one device that all dense weights of a loaded model are on, such as "cpu" or "cuda:0".

    Raises `UnsupportedModelError` for a model that is on several devices, on one that this process does not compute on
    (a GPU only if `untested`), or that accelerate moves about.
    """
    _refuse_accelerate(model)
    places: dict[str, str] = {}
    for name, tensor in _dense(model, moe_layers):
        places.setdefault(str(tensor.device), name)
        if tensor.device.type not in (here := usable_kinds(untested)):
            raise UnsupportedModelError(
                f"{name} is on {tensor.device}; this process computes on {', '.join(here)} only (experts may be "
                "on 'meta'). Load the model there first. No GPU has run this version yet; config={'untested': True} "
                "tries"
            )
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise UnsupportedModelError(f"the dense weights are on several devices ({found}); load the model on one")
    return next(iter(places), "cpu")


def _refuse_accelerate(model: Any) -> None:
    """Refuse a model that accelerate has dispatched: its hooks move weights whenever a module is called."""
    hooked = next((name or "the model" for name, part in model.named_modules() if hasattr(part, "_hf_hook")), None)
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if hooked is not None or spread:
        found = f"a hook on {hooked}" if hooked is not None else "an hf_device_map with several devices"
        raise UnsupportedModelError(
            f"the model was dispatched by accelerate (it has {found}), whose hooks would move weights behind the "
            "cache's back; load it without device_map, cpu_offload or disk_offload, take the hooks off "
            "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), or use moe_offload.from_pretrained()"
        )


def place_dense(model: Any, moe_layers: Sequence[MoELayer], device: str) -> None:
    """Move every parameter and buffer that is no expert's to `device`."""
    for _, tensor in _dense(model, moe_layers):
        if str(tensor.device) != device:
            tensor.data = tensor.data.to(device)


def _dense(model: Any, moe_layers: Sequence[MoELayer]) -> Iterator[tuple[str, Tensor]]:
    experts = {id(param) for moe in moe_layers for param in moe.tensors}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in experts:
            yield name, tensor
