"""compute="packed": a parameter whose products with few rows are computed from its codes (`packed/fused.py`).

Used only where the user asked for it: results are not plain transformers' to the bit. Shapes as in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...experts import MoELayer, RowCodes
from ...packed.exact import Run
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

    def row_codes(self, transposed: bool) -> RowCodes | None:
        return self.weight.row_codes(transposed)

    def unpack(self, row: Tensor, out: Tensor) -> None:
        self.weight.unpack(row, out)

    def multiply(self, x_PI: Tensor, rows_SB: Tensor, runs: Sequence[Run], out_PO: Tensor, transposed: bool) -> None:
        by_rows = transposed if joins_bytes(self.weight.conversions) else not transposed
        if x_PI.device.type != "cpu":
            self.weight.multiply(x_PI, rows_SB, runs, out_PO, transposed)
            return
        few = [run for run in runs if by_rows and run[2] - run[1] <= FEW and _keeps_rows(self.weight)]
        for slot, begin, end in few:
            first = 0
            for matrix in self.weight.matrices:
                out = torch.empty((end - begin, matrix.shape[0]), dtype=out_PO.dtype, device="cpu")
                multiply_fused(matrix.format, matrix.tensors(rows_SB[slot]), x_PI[begin:end], out)
                out_PO[begin:end, first : first + matrix.shape[0]] = out
                first += matrix.shape[0]
        self.weight.multiply(x_PI, rows_SB, [run for run in runs if run not in few], out_PO, transposed)


def fuse_weights(moe_layers: Sequence[MoELayer]) -> list[MoELayer]:
    """The layers, with products straight from the codes where a weight is packed by a format of ours."""
    return [
        replace(moe, packed=tuple(FusedWeight(w) if isinstance(w, MatrixWeight) else w for w in moe.packed))
        for moe in moe_layers
    ]


def _keeps_rows(weight: MatrixWeight) -> bool:
    """Whether the rows of the file's matrices, one below the other, are the outputs of a product."""
    return joins_bytes(weight.conversions) or weight.conversions == (Swap(0, 1),)
