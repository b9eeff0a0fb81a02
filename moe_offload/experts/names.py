"""What the names of modules say of experts; and under which names they keep how many there are."""

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


def says_expert(name: str, module: nn.Module) -> bool:
    """Whether the module's class, its name, or that of what it lies in has to do with experts. torch's own never do: a
    linear layer of a shared expert is one."""
    words = f"{'.'.join(name.split('.')[-2:])} {type(module).__name__}".lower()
    return "expert" in words and not type(module).__module__.startswith("torch.")


def said_count(module: Any) -> int | None:
    """E, as the module itself says it."""
    found = (getattr(module, name, None) for name in COUNT_NAMES)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 1), None)
