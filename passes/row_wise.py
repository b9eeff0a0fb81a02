"""Whether what lies between the weights of a site treats each token-expert pair by itself.

    silu(y) * z;  y[..., :I];  chunk(y, 2, dim=-1);  y + 1      each pair by itself
    y - y.mean(0);  y.flip(0);  y * len(y);  dropout(y)         not: run in pieces, the result would be another

transformers' own experts code does. What a user puts into it (a hook on the activation, another activation, dropout)
need not be, and a core is run in pieces. So only operations that are known to keep pairs apart, to the bit, are let
through: an operation that is not in these lists is refused, whoever wrote it.

Shapes: P token-expert pairs. Every value of a core has P as its first size, and nothing let through here moves it. Of a
masked site every value begins with experts and tokens [E, T], and those two stay: it `keeps` two dimensions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .find import name_of
from .sites import Site, UnknownUse

#: An element of the result comes from the elements at the same place.
ELEMENTWISE = frozenset(
    "silu gelu relu relu_ relu6 sigmoid tanh mish leaky_relu elu selu celu hardtanh hardswish hardsigmoid softplus "
    "prelu erf exp expm1 log log1p sqrt rsqrt pow square abs neg sign sin cos reciprocal mul imul mul_ add iadd add_ "
    "sub isub sub_ rsub div truediv itruediv div_ clamp clamp_ clamp_min clamp_max minimum maximum where lt le gt ge "
    "eq ne nan_to_num masked_fill to type type_as float bfloat16 half detach contiguous clone".split()
)
SPLITS = frozenset({"chunk", "split"})
ALONG_ONE = SPLITS | {"mean", "squeeze", "unsqueeze"}  # and never along the pairs
#: Where such names may come from: an operation of somebody else's may bear one of them, and do anything.
MODULES = frozenset({None, "torch", "_operator", "torch.nn.functional", "torch._C._nn", "torch._C"})


def refuse_mixed_pairs(site: Site, core: Collection[Node], fixed: Collection[Node]) -> None:
    """Raise `UnknownUse` naming a node of the site's core that is not known to keep pairs apart.

    `fixed` are the constants. A product of one with expert weights is refused too: the constant would have an entry for
    each pair of the traced call, and a piece has fewer.
    """
    reads = {read.node for read in site.reads} | {view for read in site.reads for view in read.views}
    gathered = {read.node for read in site.reads if read.offsets is None and not read.masked}
    kept = 2 if site.masked else 1
    for node in core:
        inputs = set(node.all_input_nodes)
        reads_weights = node in reads or (name_of(node) == "bmm" and gathered & inputs)
        apart = reads_weights and inputs.isdisjoint(fixed)
        if not apart and not (_is_of_torch(node) and _keeps_pairs_first(node, core) and _is_known(node, kept)):
            said = f"{node.format_node() or node} is not known to treat each token by itself"
            raise UnknownUse(site.layer, ", ".join(site.weights), said)


def _is_of_torch(node: Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target.namespace == "aten")
    return node.op == "call_method" or getattr(target, "__module__", "") in MODULES


def _is_known(node: Node, kept: int) -> bool:
    name = name_of(node)
    if name in ALONG_ONE:
        return _runs_along_a_later_dim(node, kept)
    return name in ELEMENTWISE or (name == "getitem" and _takes_all_pairs(node, kept))


def _keeps_pairs_first(node: Node, core: Collection[Node]) -> bool:
    """Whether what it combines has as many dimensions, P first, and no constant among it has an entry for each pair."""
    inputs: list[Any] = [i.meta.get("example_value") for i in node.all_input_nodes if i in core]
    ranks = {value.dim() for value in inputs if isinstance(value, Tensor)}
    outside = [i.meta.get("example_value") for i in node.all_input_nodes if i not in core]
    tensors = [value for value in outside if isinstance(value, Tensor)]  # what is no tensor is a number of the model's
    if len(ranks) > 1:
        return False
    rank = min(ranks, default=0)
    return all(c.dim() < rank or (c.dim() == rank and type(c.shape[0]) is int and c.shape[0] == 1) for c in tensors)


def _runs_along_a_later_dim(node: Node, kept: int) -> bool:
    position = 2 if name_of(node) in SPLITS else 1
    dim: Any = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    rank = _rank_of(node.args[0]) + (name_of(node) == "unsqueeze")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and rank > kept and dim % rank >= kept


def _takes_all_pairs(node: Node, kept: int) -> bool:
    """`y[:, a:b]`, `y[..., ::2]`; and one of the pieces that a split has made."""
    source, index = node.args
    if not isinstance(source, Node):
        return False
    if name_of(source) in SPLITS and isinstance(index, int):
        return True
    indices = index if isinstance(index, tuple) else (index,)
    if any(
        isinstance(i, slice) and not {type(i.start), type(i.stop), type(i.step)} <= {int, type(None)} for i in indices
    ):
        return False
    if not indices or not all(i is Ellipsis or isinstance(i, (int, slice)) for i in indices):
        return False
    taken = sum(i is not Ellipsis for i in indices)
    if indices[0] is Ellipsis:
        return taken <= _rank_of(source) - kept
    return all(i == slice(None) for i in indices[:kept])


def _rank_of(value: Any) -> int:
    example: Any = value.meta.get("example_value") if isinstance(value, Node) else None
    return example.dim() if isinstance(example, Tensor) else 0
