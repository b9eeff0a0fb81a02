"""Why a model has no experts that can be offloaded: which module really holds them, and in which form."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def explain_none(model: nn.Module) -> str:
    """Say what kind of MoE layer the model has, if any, and why it is not one the passes can rewrite."""
    for name, reason in _unsupported_moe(model):
        return (
            f"{type(model).__name__}: {name} {reason}, so its weights never reach a graph that the passes can rewrite."
        )
    return (
        f"{type(model).__name__} has no routed experts: no module dispatches through transformers' experts interface "
        "(use_experts_implementation). moe_offload helps Mixture-of-Experts models only."
    )


def _unsupported_moe(model: nn.Module) -> Iterator[tuple[str, str]]:
    """MoE-looking modules outside the experts interface, innermost description first."""
    for name, module in model.named_modules():
        kind, members = type(module).__name__, [m for m in module.children() if isinstance(m, nn.Module)]
        if "expert" not in f"{name.rpartition('.')[2]} {kind}".lower() and "moe" not in kind.lower():
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
            yield name, f"({kind}) keeps each of its {len(module)} experts in a module of its own"
        elif not isinstance(module, nn.Embedding) and any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            yield name, f"({kind}) stacks its experts but does not dispatch through transformers' experts interface"
        elif members and sum(isinstance(m, nn.Embedding) for m in members) > 1:
            yield name, f"({kind}) keeps its experts as rows of nn.Embedding, outside transformers' experts interface"
