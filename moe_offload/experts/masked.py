"""The form "masked": one product over the whole stack, each expert handed all tokens, zeros where it did not get one.

    torch.bmm(x.view(E, -1, H), self.gate_up_proj)        nobody tells the module which token goes where

A module qualifies when it is handed hidden states and nothing else, and has no router in it: without ids it can only
treat all experts alike. One that has no code of its own is read by others.
Whether zeros stay zeros in it is seen in its graph (`passes/masked.py`), which is refused by name where they do not.
"""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from .layer import Holder, MoELayer, group_tied, layer_of, stack_places
from .layout import RowLayout
from .names import find_top_k, says_expert

Stacks = dict[str, Tensor]


def find_masked(model: nn.Module) -> list[MoELayer]:
    """The layers of this form, one for each distinct set of parameters."""
    return [_layer(model, i, holders) for i, holders in enumerate(group_tied(model, _stacks_in, Stacks.values))]


def is_masked(name: str, module: nn.Module) -> bool:
    """Whether `module` stacks experts and is called with hidden states alone."""
    stacks = list(module.parameters(recurse=False))
    if len(stacks) < 2 or not says_expert(name, module) or hasattr(module, "has_gate"):
        return False
    alike = {tuple(stack.shape[:1]) for stack in stacks if stack.dim() == 3}
    return len(alike) == 1 and all(stack.dim() == 3 for stack in stacks) and _takes_one(module)


def _takes_one(module: nn.Module) -> bool:
    forward = type(module).forward
    if forward is nn.Module.forward or any(True for child in module.children() for _ in child.parameters()):
        return False
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return len(kinds) == 2 and kinds[1] in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _stacks_in(name: str, module: nn.Module) -> Stacks:
    return dict(module.named_parameters(recurse=False)) if is_masked(name, module) else {}


def _layer(model: nn.Module, index: int, holders: list[Holder[Stacks]]) -> MoELayer:
    name, module, stacks = holders[0]
    num_experts, layout, top_k = len(next(iter(stacks.values()))), RowLayout.of(stacks), find_top_k(name, module, model)
    return layer_of("masked", index, holders, layout, num_experts, top_k, stack_places, called=False)
