"""Refuse calls that would act on phantoms, where the experts cannot be reached: on the model and its parts with
experts.

.to(dtype), .half(), .cuda(), .share_memory()    would turn the phantoms into real tensors of NaN
copy.deepcopy, pickle, torch.save(model)         would copy phantoms, or files and threads
load_state_dict(with experts)                    would write into phantoms
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OffloadError
from ..runtime.model import Runtime


def refuse_what_reaches_experts(model: nn.Module, runtime: Runtime) -> None:
    held_by: dict[int, list[str]] = {}
    for place in (place for layer in runtime.layers for places in layer.moe.places for place in places):
        held_by.setdefault(id(place.module), []).append(place.attribute)
    experts = {id(module) for layer in runtime.layers for module in layer.moe.modules} | set(held_by)
    for part in model.modules():
        held = [
            f"{name}.{attribute}" if name else attribute
            for name, module in part.named_modules(remove_duplicate=False)
            for attribute in dict.fromkeys(held_by.get(id(module), ()))
        ]
        if held:
            part._apply = partial(_refuse_moves, part)  # type: ignore[method-assign]
            part.register_load_state_dict_pre_hook(partial(_refuse_loading, held))
        if part is model or id(part) in experts:  # copies of a part between them arrive at its experts
            part.__dict__["__deepcopy__"] = part.__dict__["__reduce_ex__"] = _refuse_copy


def _refuse_moves(part: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for p in part.parameters():
        probe = torch.empty(0, dtype=p.dtype, device=p.device)
        before = probe.dtype, probe.device, probe.is_shared()
        try:
            moved = fn(probe)
        except (AssertionError, RuntimeError) as error:  # torch has no such device
            raise OffloadError(_immovable(f"{(str(error).splitlines() or [''])[0]}")) from error
        if (moved.dtype, moved.device, moved.is_shared()) != before:
            shared = ", shared" if moved.is_shared() else ""
            wanted = f"{before[0]} on {before[1]} to {moved.dtype} on {moved.device}{shared}"
            raise OffloadError(_immovable(wanted))
    return part


def _immovable(wanted: str) -> str:
    return (
        f"asked to move or convert an offloaded model ({wanted}); its slots and rows are fixed. "
        "Convert or move the model first, then call optimize(); model.moe_offload.close() frees its memory"
    )


def _refuse_copy(*_: Any) -> Any:
    raise OffloadError(
        "an offloaded model cannot be copied or pickled (its experts are in files and slots); copy the model before "
        "optimize(), save it with save_pretrained(), or load it again with moe_offload.from_pretrained()"
    )


def _refuse_loading(held: list[str], _: nn.Module, state: Mapping[str, Any], prefix: str, *__: Any) -> None:
    found = [prefix + key for key in held if prefix + key in state]
    if found:
        raise OffloadError(
            f"load_state_dict() was given {len(found)} tensors of experts, such as {found[0]}; those of an offloaded "
            "model rest in files and cannot be replaced. Load weights before optimize(), or leave the experts out and "
            "load the others with strict=False"
        )
