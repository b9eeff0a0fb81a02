"""FP8 (e4m3): a byte for each weight, and a scale for each block, for each row, or for all.

codes   float8_e4m3fn   [O, I]                  0x7f and 0xff are no numbers
scale   float32, bfloat16, float16, or a power of two as float8_e8m0fnu or uint8
        [so, si]        a block has O/so rows and I/si columns, as plain transformers divides them
        [O, 1]          of each row          [1] or []       of all
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats import Format, Kernels, has_byte, place_of, powers_of_two

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True)
class FP8(Format):
    """`row_unit` is the rows of a block: 1 where one scale goes for whole columns, or for all."""

    @classmethod
    def fit(cls, tensors: Sequence[Tensor]) -> FP8:
        codes, scale = tensors
        if codes.dtype != torch.float8_e4m3fn or scale.dtype not in (*FLOATS, *EXPONENTS):
            raise CheckpointError(
                f"FP8 codes of {codes.dtype} with a scale of {scale.dtype}: codes are float8_e4m3fn, a scale is "
                "float32, bfloat16, float16, float8_e8m0fnu or uint8. The checkpoint is damaged, or in another format"
            )
        grid = grid_of(scale) if scale.dim() == 2 or scale.numel() == 1 else (0, 0)
        if codes.dim() != 2 or 0 in grid or any(n % parts for n, parts in zip(codes.shape, grid, strict=True)):
            raise CheckpointError(
                f"FP8 codes of shape {list(codes.shape)} with a scale of shape {list(scale.shape)}: the scale is "
                "[so, si] whose numbers divide those of the codes, [O, 1] or one number. The blocks cannot be told"
            )
        return cls(row_unit=codes.shape[0] // grid[0] if grid[0] > 1 else 1)

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        outputs, inputs = tensors[0].shape
        return outputs, inputs

    def rows(self, tensors: Sequence[Tensor], begin: int, end: int) -> tuple[Tensor, ...]:
        codes, scale = tensors
        if grid_of(scale)[0] > 1:
            scale = scale[begin // self.row_unit : -(-end // self.row_unit)]
        return codes[begin:end], scale

    def unpack_at_once(self, tensors: Sequence[Tensor], out_OI: Tensor) -> None:
        codes, scale = tensors
        (outputs, inputs), (so, si) = codes.shape, grid_of(scale)
        values = torch.index_select(_values(codes.device), 0, codes.reshape(-1).view(torch.uint8).int())
        blocks = values.view(so, outputs // so, si, inputs // si) * widen_scale(scale).reshape(so, 1, si, 1)
        out_OI.copy_(blocks.view(outputs, inputs))

    def unpack_compiled(self, kernels: Kernels, tensors: Sequence[Tensor], out_OI: Tensor) -> bool:
        known = tensors[1].dtype in kernels.unpack.SCALES
        if known:
            kernels.unpack.unpack_fp8(*tensors, grid_of(tensors[1]), out_OI)
        return known

    def find_fault(self, tensors: Sequence[Tensor]) -> str | None:
        codes, scale = tensors
        place = place_of(~torch.isfinite(widen_scale(scale)))
        if place is not None:
            return f"the scale at {list(place)} is {widen_scale(scale)[place].item()}, which is no finite number"
        if not has_byte(codes, signed=True):
            return None
        place = place_of((codes.view(torch.uint8) & 0x7F) == 0x7F)
        return f"the code of row {place[0]}, column {place[1]} means no number (NaN)" if place else None


def widen_scale(scale: Tensor) -> Tensor:
    """A scale in float32."""
    return powers_of_two(scale) if scale.dtype in EXPONENTS else scale.to(torch.float32)


def grid_of(scale: Tensor) -> tuple[int, int]:
    """(so, si): into how many blocks rows and columns are cut."""
    return (1, 1) if math.prod(scale.shape) == 1 else (scale.shape[0], scale.shape[1])


@cache
def _values(device: torch.device) -> Tensor:
    """Byte -> its value in float32."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.float32).to(device)
