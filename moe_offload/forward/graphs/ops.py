"""The ops of `passes` as the rest of the package uses them: bound to a layer and released, called, and put as marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import passes
from passes import ops

from ...runtime.layer import LayerRuntime


def bank_of(layer: LayerRuntime) -> passes.Bank:
    """How the passes see this layer's bank."""
    moe = layer.moe
    parameters = {field.name for field in moe.unpacked.fields}
    plain = tuple(field for field in moe.layout.fields if field.name in parameters)
    packed = tuple((weight.name, ops.register_packed(weight)) for weight in moe.packed)
    return passes.Bank(plain, layer.cache.slots, moe.layout.dtype, packed)


def rows_of(layer: LayerRuntime) -> str:
    """What a graph takes for granted of a layer's rows, beside shapes and dtypes of its parameters; empty where those
    say it all. Layers may share a graph only if it is the same of both."""
    bank = bank_of(layer)
    return repr((bank.fields, bank.packed)) if bank.packed else ""


def bind(bank_SN: Tensor, layer: Any) -> None:
    """Let rewritten graphs that are handed this bank reach `layer`."""
    ops.bind(bank_SN, layer)


def unbind(bank_SN: Tensor) -> None:
    ops.unbind(bank_SN)


def experts_op(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, key: Tensor) -> Tensor:
    """The marker op: one layer's experts, complete in itself, for code that the passes never see. `key` is bound to the
    layer. A backward through it raises."""
    out: Tensor = ops.experts(x_TH, ids_TK, weights_TK, key)
    return out


def masked_op(x_MH: Tensor, key: Tensor) -> Tensor:
    """The marker op of a masked layer."""
    out: Tensor = ops.masked_experts(x_MH, key)
    return out


def refuse_backward_of_experts(refuse: Callable[[], Any]) -> None:
    """Let `refuse` answer whoever asks for gradients of the marker op, in a graph that somebody else has compiled."""
    ops.serve_no_gradient(refuse)


def unserved(ids_TK: Tensor, rows: str) -> Tensor:
    """`ids_TK` (or what stands for ids), in code that is traced for our backend; a graph that never came to it raises.

    `rows` (see `rows_of`) becomes a constant of the graph, so Dynamo makes another graph where it is another.
    """
    marked: Tensor = ops.unserved(ids_TK, rows)
    return marked
