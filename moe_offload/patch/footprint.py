"""`model.get_memory_footprint()` of an offloaded model: the bytes that it holds, not those of its parameters' shapes.

The parameters of experts are phantoms, with the shape of all experts and the memory of one row: slots are counted
instead.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from ..experts import local_part
from ..runtime.model import Runtime


def count_what_is_held(model: nn.Module, runtime: Runtime) -> None:
    """Let the model's own `get_memory_footprint`, where it has one, tell bytes of dense weights and of expert slots."""
    if hasattr(model, "get_memory_footprint"):
        model.__dict__["get_memory_footprint"] = partial(_held_bytes, model, runtime)


def _held_bytes(model: nn.Module, runtime: Runtime, return_buffers: bool = True) -> int:
    phantoms = {id(phantom) for layer in runtime.layers for phantom in layer.moe.tensors}
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    dense_bytes = sum(local_part(t).numel() * t.element_size() for t in tensors if id(t) not in phantoms)
    slot_bytes = sum(layer.slots.bytes.numel() for layer in runtime.layers)
    return int(dense_bytes + slot_bytes)
