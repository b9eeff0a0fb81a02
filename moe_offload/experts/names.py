"""What names say of experts: those of modules, and those under which modules and configurations keep E and K."""

from __future__ import annotations

from typing import Any

from torch import nn

#: The names under which modules keep E.
COUNT_NAMES = (
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
    "n_routed_experts",
    "num_routed_experts",
    "total_experts",
)

#: The names under which configurations keep K. Only the plan's floor depends on it, never a result.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_selects",
    "top_k",
)


def says_expert(name: str, module: nn.Module) -> bool:
    """Whether the module's class, its name, or that of what it lies in has to do with experts. torch's own never do: a
    linear layer of a shared expert is one."""
    words = f"{'.'.join(name.split('.')[-2:])} {type(module).__name__}".lower()
    return "expert" in words and not type(module).__module__.startswith("torch.")


def said_count(module: Any) -> int | None:
    """E, as the module itself says it."""
    found = (getattr(module, name, None) for name in COUNT_NAMES)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 1), None)


def find_top_k(name: str, module: Any, model: Any) -> int | None:
    """K, from the experts module's own configuration or from the module that routes to it; None if neither says."""
    parent: nn.Module = model.get_submodule(name.rpartition(".")[0])
    holders = [module, parent, *parent.children(), getattr(module, "config", None), getattr(model, "config", None)]
    for holder in holders:
        for key in TOP_K_NAMES:
            value = getattr(holder, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
