"""compute="packed": a parameter whose products with few rows are computed from its codes (`packed/fused.py`).

Used only where the user asked for it: results are not plain transformers' to the bit. Shapes as in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...experts import MoELayer
from ...packed.fused import multiply_fused
from ..conversion import Swap, joins_bytes
from .weights import MatrixWeight
from .wrapped import WrappedWeight

FEW = 8  # rows; more of them share a matrix that is unpacked once


@dataclass(frozen=True)
class FusedWeight(WrappedWeight):
    """`weight`, multiplied without unpacking it. It is a `PackedWeight` (experts/layout.py)."""

    @property
    def workspace_bytes(self) -> int:
        return self.weight.workspace_bytes

    def unpack(self, row: Tensor, out: Tensor) -> None:
        self.weight.unpack(row, out)

    def multiply(self, x_MI: Tensor, row: Tensor, out_MO: Tensor, transposed: bool) -> None:
        by_rows = transposed if joins_bytes(self.weight.conversions) else not transposed
        if len(x_MI) > FEW or not by_rows or not _keeps_rows(self.weight):
            self.weight.multiply(x_MI, row, out_MO, transposed)
            return
        first = 0
        for matrix in self.weight.matrices:
            out = torch.empty((len(x_MI), matrix.shape[0]), dtype=out_MO.dtype)
            multiply_fused(matrix.format, matrix.tensors(row), x_MI, out)
            out_MO[:, first : first + matrix.shape[0]] = out
            first += matrix.shape[0]


def fuse_weights(moe_layers: Sequence[MoELayer]) -> list[MoELayer]:
    """The layers, with products straight from the codes where a weight is packed by a format of ours."""
    return [
        replace(moe, packed=tuple(FusedWeight(w) if isinstance(w, MatrixWeight) else w for w in moe.packed))
        for moe in moe_layers
    ]


def _keeps_rows(weight: MatrixWeight) -> bool:
    """Whether the rows of the file's matrices, one below the other, are the outputs of a product."""
    return joins_bytes(weight.conversions) or weight.conversions == (Swap(0, 1),)
