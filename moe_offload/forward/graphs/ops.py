"""The ops of `passes`, for the rest of the package, which may not import `passes`: bind them, call them, put marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import passes
from passes import ops
from passes.core_graph import VECTORS

from ...experts import MoELayer
from ...runtime.layer import LayerRuntime


def bank_of(layer: LayerRuntime) -> passes.Bank:
    """How the passes see this layer's bank."""
    moe = layer.moe
    parameters = {field.name for field in moe.unpacked.fields}
    plain = tuple(field for field in moe.layout.fields if field.name in parameters)
    packed = tuple((weight.name, ops.register_packed(weight)) for weight in moe.packed)
    return passes.Bank(plain, layer.cache.slots, moe.layout.dtype, packed)


def rows_of(layer: LayerRuntime) -> str:
    """What a graph assumes of a layer's rows beside the shapes and dtypes of its parameters; empty where it is no more.

    Layers may share a graph only if this is equal for both.
    """
    bank = bank_of(layer)
    return repr((bank.fields, bank.packed)) if bank.packed or any(layer.moe.layout.begins) else ""


def fills_vectors(moe: MoELayer) -> bool:
    """`passes.core_graph.fills_vectors` of code that is not traced: its tensors are as wide as the weights are."""
    return all(size % VECTORS == 0 for field in moe.unpacked.fields for size in field.shape)


def bind(bank_SN: Tensor, layer: Any) -> None:
    """Let rewritten graphs that are handed this bank reach `layer`."""
    ops.bind(bank_SN, layer)


def unbind(bank_SN: Tensor) -> None:
    ops.unbind(bank_SN)


def experts_op(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, key: Tensor) -> Tensor:
    """The op `experts`: the experts of the layer that `key` is bound to, complete by itself, for code that the passes
    do not see. A backward through it raises."""
    out: Tensor = ops.experts(x_TH, ids_TK, weights_TK, key)
    return out


def masked_op(x_MH: Tensor, key: Tensor) -> Tensor:
    """The marker op of a masked layer."""
    out: Tensor = ops.masked_experts(x_MH, key)
    return out


def refuse_backward_of_experts(refuse: Callable[[], Any]) -> None:
    """Let a backward through the op `experts` call `refuse`, also in a graph that the user compiled."""
    ops.serve_no_gradient(refuse)


def mark_unserved(ids_TK: Tensor, rows: str) -> Tensor:
    """`ids_TK` (or what stands for ids) itself, marked: our backend removes the mark, and a graph that was never given
    to it raises there.

    `rows` (see `rows_of`) becomes a constant of the graph, so Dynamo makes another graph where it is another.
    """
    marked: Tensor = ops.unserved(ids_TK, rows)
    return marked
