"""The form "modules": each expert is a module, in a `ModuleList` or `ModuleDict`, and the model's own code calls it.

    self.experts = nn.ModuleList([MLP(config) for _ in range(E)])        self.experts[e](x[tokens])

Nothing is asked of the code around it: whatever loop it has, it ends in the call of an expert. What could be taken for
such a list and is none: the layers of a model (they are no experts by name, and hold lists of their own), and lists of
whole models. Members without parameters (identities) are no experts that could be offloaded, and are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .layer import Holder, MoELayer, Place, group_tied, layer_of
from .layout import RowLayout
from .names import find_top_k

Members = list[tuple[str, nn.Module]]


def find_modules(model: nn.Module) -> list[MoELayer]:
    """The layers of this form, one for each distinct set of experts.

    Raises `UnsupportedModelError`, naming the module, where an expert's weights can be reached by another way as well.
    """
    tied = group_tied(model, experts_in, lambda members: (p for _, member in members for p in member.parameters()))
    layers = [_layer(model, i, holders) for i, holders in enumerate(tied)]
    _refuse_shared(model, layers)
    return layers


def experts_in(name: str, module: nn.Module) -> Members:
    """The experts of `module`, `[(name in it, expert)]`, if it is a list of experts; else nothing."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return []
    members = [(key, member) for key, member in module.named_children() if any(True for _ in member.parameters())]
    if len(members) < 2 or not _says_expert(name, module, members[0][1]):
        return []
    if len({_kind_of(member) for _, member in members}) > 1 or any(_is_no_expert(member) for _, member in members):
        return []
    return members


def members_of(moe: MoELayer) -> Iterator[tuple[int, Any]]:
    """The experts of a layer of this form, `(e, module)`; of tied lists there may be several modules for one."""
    seen: set[int] = set()
    for name, module in zip(moe.names, moe.modules, strict=True):
        for e, (_, member) in enumerate(experts_in(name, module)):
            if id(member) not in seen:
                seen.add(id(member))
                yield e, member


def _says_expert(name: str, module: nn.Module, member: nn.Module) -> bool:
    words = f"{name.rpartition('.')[2]} {type(module).__name__} {type(member).__name__}".lower()
    return "expert" in words and "layer" not in type(member).__name__.lower()


def _kind_of(member: nn.Module) -> Any:
    return type(member), tuple((name, tuple(p.shape), p.dtype) for name, p in member.named_parameters())


def _is_no_expert(member: nn.Module) -> bool:
    """Whether it is more than one expert: a layer or a model with lists or attention of its own."""
    return any(
        isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention))
        or "attention" in type(part).__name__.lower()
        for part in member.modules()
    )


def _layer(model: nn.Module, index: int, holders: list[Holder[Members]]) -> MoELayer:
    name, module, members = holders[0]
    for key, member in members:
        _refuse_unlike(f"{name}.{key}", member)
    layout = RowLayout.in_order((n, tuple(p.shape), p.dtype) for n, p in members[0][1].named_parameters())
    return layer_of("modules", index, holders, layout, len(members), find_top_k(name, module, model), _places)


def _places(module: nn.Module, members: Members) -> Iterator[Place]:
    for e, (key, member) in enumerate(members):
        for path, _ in member.named_parameters():
            owner, _, attribute = path.rpartition(".")
            yield Place(member.get_submodule(owner), attribute, f"{key}.{path}", path, e)


def _refuse_unlike(name: str, expert: nn.Module) -> None:
    """Raise where an expert has weights that would not go through a slot bit for bit."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in expert.modules()):
        raise UnsupportedModelError(
            f"{name}: it is compiled by torch.jit, which keeps the weights for itself. Use the model before "
            "torch.jit.script or torch.jit.trace"
        )
    seen: set[int] = set()
    for path, param in expert.named_parameters(remove_duplicate=False):
        if type(param) is not nn.Parameter:
            raise UnsupportedModelError(
                f"{name}: its {path} is a {type(param).__name__}, not an ordinary parameter; experts in such a format "
                "are not supported. Use the original checkpoint"
            )
        if id(param) in seen:
            raise UnsupportedModelError(f"{name}: it has the same parameter twice ({path}), which is not supported yet")
        if not param.is_contiguous():
            raise UnsupportedModelError(
                f"{name}: its {path} is not contiguous, and kernels may round otherwise for one that is; store it with "
                ".contiguous() before optimize()"
            )
        seen.add(id(param))
    weights = [path for path, buffer in expert.named_buffers() if buffer.dim() > 1]
    if weights:
        raise UnsupportedModelError(
            f"{name}: it keeps weights in buffers ({weights[0]}), as quantised modules do, and those do not move with "
            "its parameters. Use the original checkpoint"
        )


def _refuse_shared(model: nn.Module, layers: list[MoELayer]) -> None:
    """Raise where a parameter of an expert is also somebody else's: a phantom there would be read outside of a call."""
    owner: dict[int, tuple[MoELayer, int | None]] = {}
    for layer in layers:
        for place in layer.own_places:
            known = owner.setdefault(id(place.tensor), (layer, place.expert))
            if known != (layer, place.expert):
                raise UnsupportedModelError(
                    f"{layer.name}: expert {place.expert} shares {place.field} with expert {known[1]} of "
                    f"{known[0].name}; experts that are tied one by one are not supported yet"
                )
    known_places = {(id(p.module), p.attribute) for layer in layers for places in layer.places for p in places}
    for name, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            if id(param) in owner and (id(module), attribute) not in known_places:
                layer, e = owner[id(param)]
                raise UnsupportedModelError(
                    f"{name}.{attribute} is tied to expert {e} of {layer.name}, and is used outside of it; such "
                    "weights cannot be offloaded"
                )
