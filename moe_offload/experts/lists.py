"""The form "lists": experts as entries of `ParameterList`s, one list for each projection.

linear(x, self.weight_gate[e])          self.weight_gate = nn.ParameterList([Parameter(I, H) for each expert])
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..errors import UnsupportedModelError
from .layer import Holder, MoELayer, Place, group_tied, layer_of
from .layout import RowLayout
from .names import find_top_k, says_expert

Lists = dict[str, nn.ParameterList]


def find_lists(model: nn.Module) -> list[MoELayer]:
    """The layers of this form, one for each distinct set of parameters.

    Raises `UnsupportedModelError`, naming the module, where experts differ in size or kind.
    """
    tied = group_tied(model, lists_in, lambda lists: (param for one in lists.values() for param in one))
    return [_layer(model, i, holders) for i, holders in enumerate(tied)]


def lists_in(name: str, module: nn.Module) -> Lists:
    """The lists of equal length that `module` keeps its experts in; nothing where it keeps none so."""
    if not says_expert(name, module):
        return {}
    lists = {key: child for key, child in module.named_children() if isinstance(child, nn.ParameterList)}
    lengths = set(map(len, lists.values()))
    return lists if len(lengths) == 1 and min(lengths) > 1 else {}


def _layer(model: nn.Module, index: int, holders: list[Holder[Lists]]) -> MoELayer:
    name, module, lists = holders[0]
    for field, params in lists.items():
        if len({(type(p), tuple(p.shape), p.dtype, p.is_contiguous()) for p in params}) > 1:
            raise UnsupportedModelError(
                f"{name}: its experts differ in {field} (shapes, dtypes or layouts); only experts that are alike can "
                "share slots"
            )
        if type(params[0]) is not nn.Parameter or not params[0].is_contiguous():
            raise UnsupportedModelError(
                f"{name}: its {field} are no ordinary, contiguous parameters. Use the original checkpoint"
            )
    num_experts = len(next(iter(lists.values())))
    layout = RowLayout.in_order((field, tuple(params[0].shape), params[0].dtype) for field, params in lists.items())
    return layer_of("lists", index, holders, layout, num_experts, find_top_k(name, module, model), _places)


def _places(_: nn.Module, lists: Lists) -> Iterator[Place]:
    for field, params in lists.items():
        for e in range(len(params)):
            yield Place(params, str(e), f"{field}.{e}", field, e)
