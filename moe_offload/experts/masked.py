"""The form "masked": one product over the whole stack, each expert handed all tokens, zeros where it did not get one.

    torch.bmm(x.view(E, -1, H), self.gate_up_proj)        nobody tells the module which token goes where

A module qualifies when it is handed hidden states and nothing else: without ids it can only treat all experts alike.
Whether zeros stay zeros in it is seen in its graph (`passes/masked.py`), which is refused by name where they do not.
"""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from .layer import MoELayer, Place
from .layout import RowLayout
from .names import find_top_k, says_expert


def find_masked(model: nn.Module) -> list[MoELayer]:
    """The layers of this form, one for each distinct set of parameters."""
    found: dict[tuple[int, ...], list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if is_masked(name, module):
            key = tuple(id(param) for param in module.parameters(recurse=False))
            found.setdefault(key, []).append((name, module))
    return [_layer(model, i, members) for i, members in enumerate(found.values())]


def is_masked(name: str, module: nn.Module) -> bool:
    """Whether `module` stacks experts and is called with hidden states alone."""
    stacks = list(module.parameters(recurse=False))
    if len(stacks) < 2 or not says_expert(name, module) or hasattr(module, "has_gate"):
        return False
    alike = {tuple(stack.shape[:1]) for stack in stacks if stack.dim() == 3}
    return len(alike) == 1 and all(stack.dim() == 3 for stack in stacks) and _takes_one(module)


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2


def _layer(model: nn.Module, index: int, members: list[tuple[str, nn.Module]]) -> MoELayer:
    name, module = members[0]
    stacks: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    num_experts, layout = len(next(iter(stacks.values()))), RowLayout.of(stacks)
    return MoELayer(
        index,
        tuple(n for n, _ in members),
        tuple(m for _, m in members),
        num_experts,
        min(find_top_k(name, module, model) or num_experts, num_experts),
        layout,
        layout,
        form="masked",
        places=tuple(tuple(Place(m, field, field, field) for field in stacks) for _, m in members),
    )
