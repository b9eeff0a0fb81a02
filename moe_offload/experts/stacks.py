"""The form "stacks": experts stacked in a parameter `[E, ...]`, which the model's code indexes by a number in a loop.

    for e in hit:  y = linear(x[tokens], self.gate_up_proj[e])         self.w1.view(-1, F, H)[e]  of a stack [E*F, H]

Each module that holds stacks is a layer by itself: two that are used one after the other, for the same experts, are two
layers. One stack may be longer than another: what is beyond are experts without weights of their own (identities),
whose share of it is never read.

What the code does with a stack is not known here. Whoever serves it answers `W[e]`, and raises at anything else.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .interface import is_experts
from .layer import Holder, MoELayer, group_tied, layer_of, stack_places
from .layout import RowLayout
from .masked import is_masked
from .names import find_top_k, said_count, says_expert

Stacks = dict[str, Tensor]


def find_stacks(model: nn.Module) -> list[MoELayer]:
    """The layers of this form, one for each distinct set of parameters.

    Raises `UnsupportedModelError`, naming the module, where a stack is no ordinary parameter.
    """
    return [_layer(model, i, holders) for i, holders in enumerate(group_tied(model, stacks_in, Stacks.values))]


def stacks_in(name: str, module: nn.Module) -> Stacks:
    """The stacks that `module` holds by itself, `{name: [E, ...] or [E*F, H]}`; nothing where there are none."""
    if is_experts(module) or is_masked(name, module) or not says_expert(name, module):
        return {}
    own: Stacks = dict(module.named_parameters(recurse=False))
    matrices = {name: param for name, param in own.items() if param.dim() == 3 and len(param) > 1}
    if matrices:
        sizes = {len(param) for param in matrices.values()}
        biases = {name for name, param in own.items() if param.dim() == 2 and len(param) in sizes}
        return {name: param for name, param in own.items() if name in matrices or name in biases}
    count = said_count(module)
    if count is None:
        return {}
    joined = {name: param for name, param in own.items() if param.dim() == 2 and len(param) > count}
    return joined if all(len(param) % count == 0 for param in joined.values()) else {}


def _layer(model: nn.Module, index: int, holders: list[Holder[Stacks]]) -> MoELayer:
    name, module, stacks = holders[0]
    for field, stack in stacks.items():
        if type(stack) is not nn.Parameter or not stack.is_contiguous():
            raise UnsupportedModelError(
                f"{name}: its {field} is {'not contiguous' if type(stack) is nn.Parameter else type(stack).__name__}; "
                "experts are offloaded from ordinary, contiguous parameters. Use the original checkpoint"
            )
    num_experts, shapes = _shapes(module, stacks)
    layout = RowLayout.in_order((field, shapes[field], stack.dtype) for field, stack in stacks.items())
    return layer_of("stacks", index, holders, layout, num_experts, _top_k(name, module, model), stack_places)


def _top_k(name: str, module: nn.Module, model: nn.Module) -> int | None:
    """K may be said by what is around the module that holds the experts, or around that."""
    parent = name.rpartition(".")[0]
    return find_top_k(name, module, model) or find_top_k(parent, model.get_submodule(parent), model)


def _shapes(module: nn.Module, stacks: Stacks) -> tuple[int, dict[str, tuple[int, ...]]]:
    """How many experts there are, and the shape of one's share of each stack."""
    if any(stack.dim() == 3 for stack in stacks.values()):
        return max(map(len, stacks.values())), {field: tuple(stack.shape[1:]) for field, stack in stacks.items()}
    count = said_count(module) or 1
    return count, {field: (len(stack) // count, *stack.shape[1:]) for field, stack in stacks.items()}
