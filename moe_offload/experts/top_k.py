"""K, how many experts a token uses: from whatever configuration is near the experts."""

from __future__ import annotations

from typing import Any

from torch import nn

# The names under which configurations keep K. Only the plan's floor depends on it, never a result.
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
