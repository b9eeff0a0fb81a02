"""Random codes of quantised experts: numbers that mean nothing, of the size that weights have."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ...checkpoint.quantised.layouts import ExpertMatrix, Layout

#: Root mean square of the weights that random codes stand for, with a scale of one.
SIZES = {"mxfp4": 2.93, "int4": 4.64, "fp8": 128.0}
WANTED = 0.02
EXPONENT = 120  # 2^(120 - 127) times 2.93 is about the size that is wanted


def random_codes(layout: Layout, matrix: ExpertMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix in a checkpoint; no two matrices alike."""
    codes, scales, *shape = layout.entries(matrix)
    generator = torch.Generator().manual_seed(zlib.crc32(matrix.key.encode()))
    raw = torch.randint(-(2**63), 2**63 - 1, (codes.nbytes // 8,), generator=generator).view(torch.uint8)
    if layout.kind == "fp8":
        raw[(raw & 0x7F) == 0x7F] = 0  # which means no number
    fill = EXPONENT if layout.kind == "mxfp4" else WANTED / SIZES[layout.kind]
    found = {
        codes.key: raw.view(codes.dtype).view(codes.shape),
        scales.key: torch.full(scales.shape, fill, dtype=scales.dtype),
    }
    return found | {entry.key: torch.tensor(matrix.shape) for entry in shape}
