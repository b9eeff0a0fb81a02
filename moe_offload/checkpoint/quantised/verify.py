"""Compare our unpacking with transformers' own operations, on one expert of each kind of layer, when a model is loaded.

A later transformers may make other weights of the same bytes. Then its own operations are called for every expert
that is unpacked: slow, and never wrong.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...experts import MoELayer, PackedWeight
from ...packed.exact import Run
from ...packed.workspace import borrow_workspace
from .columns import MadeBy, Packing
from .weights import MatrixWeight
from .wrapped import WrappedWeight

logger = logging.getLogger("moe_offload")


class StandIn(nn.Module):
    """What transformers' operations ask of a model: its configuration, and what one layer's parameters look like. It
    stands in for the model itself, which nobody could let go otherwise: graphs know their weights for good."""

    def __init__(self, moe: MoELayer, config: Any):
        super().__init__()
        self.config = config
        for field in moe.unpacked.fields:
            param = torch.empty((moe.num_experts, *field.shape), dtype=field.dtype, device="meta")
            for name in moe.names:
                _module_at(self, name).register_parameter(field.name, nn.Parameter(param, requires_grad=False))


def _module_at(root: nn.Module, name: str) -> nn.Module:
    for part in name.split("."):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


@dataclass(frozen=True, eq=False)
class ConvertedWeight(WrappedWeight):
    """A parameter that transformers' own operations unpack. It is a `PackedWeight` (experts/layout.py)."""

    made_by: MadeBy
    model: StandIn

    @property
    def workspace_bytes(self) -> int:
        return 4 * math.prod(self.shape) * self.dtype.itemsize  # what they make on the way, in float32

    def unpack(self, row: Tensor, out: Tensor) -> None:
        out.copy_(convert_one(self.made_by, self.weight, row.cpu(), self.model))

    def multiply(self, x_PI: Tensor, rows_SB: Tensor, runs: Sequence[Run], out_PO: Tensor, transposed: bool) -> None:
        if x_PI.device.type == "cpu":
            whole = borrow_workspace(self.shape, self.dtype)
        else:
            whole = x_PI.new_empty(self.shape, dtype=self.dtype)
        for slot, begin, end in runs:
            self.unpack(rows_SB[slot], whole)
            torch.mm(x_PI[begin:end], whole.t() if transposed else whole, out=out_PO[begin:end])


def verify_unpacking(
    moe_layers: Sequence[MoELayer],
    packings: Sequence[Packing | None],
    model: Any,
    read_row: Callable[[MoELayer], Tensor],
) -> list[MoELayer]:
    """The layers, with weights that give transformers' bits; `read_row` reads some expert of a layer."""
    same: dict[Any, bool] = {}
    verified = []
    for moe, packing in zip(moe_layers, packings, strict=True):
        if packing is None:
            verified.append(moe)
            continue
        as_loaded = _as_loaded(packing.weights, moe)
        kind, stand_in = (packing.layout, as_loaded), StandIn(moe, model.config)
        if kind not in same:
            row = read_row(moe)
            same[kind] = all(_agrees(weight, packing.made_by[weight.name], row, stand_in) for weight in as_loaded)
            for weight in as_loaded:
                weight.try_products()
            if not same[kind]:
                logger.warning(
                    "%s: the installed transformers unpacks these experts otherwise than moe_offload does; its own "
                    "operations are used, which are slower",
                    moe.name,
                )
        weights: Sequence[PackedWeight] = as_loaded
        if not same[kind]:
            weights = [ConvertedWeight(weight, packing.made_by[weight.name], stand_in) for weight in as_loaded]
        verified.append(replace(moe, packed=tuple(weights)))
    return verified


def _as_loaded(weights: Sequence[MatrixWeight], moe: MoELayer) -> tuple[MatrixWeight, ...]:
    """The weights, each of the dtype that transformers' loading gave its parameter: that is not always the dtype which
    was asked for. compressed-tensors unpacks into the dtype of the scales, and nothing converts it afterwards."""
    loaded = {field.name: field.dtype for field in moe.unpacked.fields}
    return tuple(replace(weight, dtype=loaded[weight.name]) for weight in weights)


def convert_one(made_by: MadeBy, weight: MatrixWeight, row: Tensor, model: StandIn) -> Tensor:
    """One expert's parameter, as transformers makes it of the tensors in a row.

    Its operations take lists with one tensor of each expert, or one stacked tensor; both may be of a single expert.
    """
    found: Any = {}
    for matrix in weight.matrices:
        for field, tensor in zip(matrix.fields, matrix.tensors(row), strict=True):
            found[made_by.patterns[field.name]] = [tensor[None] if made_by.stacked else tensor]
    for op in made_by.converter.operations:
        found = op.convert(
            found,
            source_patterns=made_by.converter.source_patterns,
            target_patterns=made_by.converter.target_patterns,
            full_layer_name=made_by.parameter,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    [tensor] = found.values()
    tensor = tensor[0] if isinstance(tensor, list) else tensor
    made: Tensor = tensor[0] if tensor.dim() > len(weight.shape) else tensor
    return made


def _agrees(weight: MatrixWeight, made_by: MadeBy, row: Tensor, model: StandIn) -> bool:
    ours = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    weight.unpack(row, ours)
    theirs = convert_one(made_by, weight, row, model).to(weight.dtype).contiguous()
    return theirs.shape == ours.shape and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
