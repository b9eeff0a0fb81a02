"""What a router says before its experts are called: loads of what will be asked for begin at once, several at a time.

It is a hint. What the router's output means is guessed from its form (ids, a mask, or scores), and a wrong guess costs
reads that nobody needed: what is read when an expert is called does not depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.layer import LayerRuntime
from ..binding import Scope

FEW = 256  # ids
ROUTERS = ("gate", "router", "switch")


def hint_from_routers(layer: LayerRuntime, scope: Scope, model: nn.Module) -> None:
    """Let the routers beside the experts of `layer`, where there are any, say what will be asked for."""
    for name, module in zip(layer.moe.names, layer.moe.modules, strict=True):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
            continue
        for child, beside in parent.named_children():
            if beside is not module and _is_router(child, beside, layer.moe.num_experts):
                beside.register_forward_hook(_hook(layer, scope))


def _is_router(name: str, module: nn.Module, num_experts: int) -> bool:
    said = f"{name} {type(module).__name__}".lower()
    return getattr(module, "out_features", num_experts) == num_experts and any(word in said for word in ROUTERS)


def _hook(layer: LayerRuntime, scope: Scope) -> Any:
    calls, num_experts, top_k = layer.calls, layer.moe.num_experts, layer.moe.top_k
    complete = layer.moe.complete

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or calls is None or not scope.is_entered:
            return
        if -1 in calls.cache.slot_of:  # else all there is is here
            calls.expect(e for e in ids_in(output, num_experts, top_k) if e < complete)

    return hook


def ids_in(output: Any, num_experts: int, top_k: int) -> list[int]:
    """The experts that a router's `output` names, ascending, as most loops call them; none if it is unclear."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    tensors = [x for x in outputs if isinstance(x, Tensor) and x.dim() and x.numel()]
    for x in tensors:
        if not x.is_floating_point() and not x.is_complex():
            if x.shape[-1] == num_experts and int(x.max()) <= 1:  # a mask, one column an expert
                return _ascending(x.reshape(-1, num_experts).any(dim=0).nonzero())
            if x.dtype != torch.bool and x.dim() > 1 and x.shape[-1] <= num_experts:
                return _ascending(x)
    for x in tensors:
        if x.is_floating_point() and x.dim() > 1 and x.shape[-1] == num_experts:
            return _ascending(x.float().topk(min(top_k, num_experts), dim=-1).indices)
    return []


def _ascending(ids: Tensor) -> list[int]:
    """Each once. Of a few, as in a decode step, Python finds them in a tenth of the time of a kernel."""
    if ids.numel() <= FEW:
        return sorted(set(ids.flatten().tolist()))
    found: list[int] = ids.unique().tolist()
    return found
