"""The products as tensor operations, by the CPU's own formula: to compare with, not to use.

Shapes: P token-expert pairs, S slots, B bytes of a row, H hidden, M rows of one expert's matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....experts import RowCodes
from ....packed import FORMATS
from .. import reference as plain

#: Of each format the dtype of its codes, and how many of them one element holds.
CODES = {"mxfp4": (torch.uint8, 2), "fp8": (torch.float8_e4m3fn, 1), "int4": (torch.int32, 8)}


def unpack_rows(rows_SB: Tensor, codes: RowCodes) -> Tensor:
    """The weights [S, M, H] in these rows."""
    dtype, each = CODES[codes.format]
    shape = (codes.outputs, codes.inputs // each)
    out_SMH = torch.empty(len(rows_SB), codes.rows, codes.inputs, dtype=codes.dtype, device=rows_SB.device)
    for row, whole in zip(rows_SB, out_SMH, strict=True):
        for i, part in enumerate(whole.split(codes.outputs)):
            at, size = codes.codes_at + i * codes.codes_step, codes.scale_dtype.itemsize
            tensors = [_view(row, at, dtype, shape)]
            tensors += [_view(row, (codes.scales_at + i * codes.scales_step) * size, codes.scale_dtype, codes.grid)]
            FORMATS[codes.format].fit(tensors).unpack_torch(tensors, part)
    return out_SMH


def indexed_mm(x_PH: Tensor, rows_SB: Tensor, slots_P: Tensor, codes: RowCodes) -> Tensor:
    """`out[p] = weight[slots[p]] @ x[p]`, [P, M]."""
    return plain.indexed_mm(x_PH, unpack_rows(rows_SB, codes), slots_P)


def gated_mm(x_PH: Tensor, rows_SB: Tensor, slots_P: Tensor, codes: RowCodes) -> Tensor:
    """`silu(gate) * up` of `[gate, up] = weight[slots[p]] @ x[p]`, [P, I]."""
    return plain.gated_mm(x_PH, unpack_rows(rows_SB, codes), slots_P)


def _view(row: Tensor, at: int, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    nbytes = shape[0] * shape[1] * dtype.itemsize
    return row[at : at + nbytes].view(dtype).view(shape)
