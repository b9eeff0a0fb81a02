"""MXFP4: two 4-bit floats in a byte, low nibble first, and a power of two for each 32 columns.

codes   uint8 or int8   [O, G, 16] or [O, I/2]
scales  uint8 or float8_e8m0fnu   [O, G]        2^(byte - 127); byte 255 is no number
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats import Format, Kernels, has_byte, place_of, powers_of_two

GROUP = 32
#: What the sixteen codes mean. Code 8 is -0.0, and keeps its sign.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class MXFP4(Format):
    @classmethod
    def fit(cls, tensors: Sequence[Tensor]) -> MXFP4:
        codes, scales = tensors
        bytes_of_row = codes.numel() // max(codes.shape[0], 1) if codes.dim() in (2, 3) else -1
        right = bytes_of_row > 0 and tuple(scales.shape) == (codes.shape[0], bytes_of_row * 2 // GROUP)
        right = right and bytes_of_row * 2 % GROUP == 0 and (codes.dim() == 2 or codes.shape[2] == GROUP // 2)
        if not right:
            raise CheckpointError(
                f"MXFP4 codes of shape {list(codes.shape)} with scales of shape {list(scales.shape)}: codes are "
                "[O, G, 16] or [O, G * 16], and scales [O, G]. The checkpoint is damaged, or in another format"
            )
        if codes.dtype not in (torch.uint8, torch.int8) or scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            raise CheckpointError(
                f"MXFP4 codes of {codes.dtype} with scales of {scales.dtype}: codes are uint8 or int8, scales uint8 or "
                "float8_e8m0fnu. The checkpoint is damaged, or in another format"
            )
        return cls()

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        outputs, groups = tensors[1].shape
        return outputs, groups * GROUP

    def unpack_at_once(self, tensors: Sequence[Tensor], out_OI: Tensor) -> None:
        codes, scales = tensors
        pairs = torch.index_select(_pairs(codes.device), 0, codes.reshape(-1).view(torch.uint8).int())
        values_OGJ = pairs.view(torch.float32).view(*scales.shape, GROUP)
        out_OI.copy_((values_OGJ * powers_of_two(scales)[..., None]).flatten(-2))

    def unpack_compiled(self, kernels: Kernels, tensors: Sequence[Tensor], out_OI: Tensor) -> bool:
        kernels.unpack.unpack_mxfp4(*tensors, _table(), out_OI)
        return True

    def turn_compiled(self, kernels: Kernels, tensors: Sequence[Tensor], out_IO: Tensor) -> bool:
        kernels.unpack_turned.unpack_mxfp4_turned(*tensors, _table(), out_IO)
        return True

    def find_fault(self, tensors: Sequence[Tensor]) -> str | None:
        if not has_byte(tensors[1], signed=False):
            return None
        place = place_of(tensors[1].view(torch.uint8) == 255)
        return f"the scale of row {place[0]}, group {place[1]} is 255, which is no number" if place else None


@cache
def _pairs(device: torch.device) -> Tensor:
    """Byte -> its two values in float32, as one int64."""
    byte, values = torch.arange(256, device="cpu"), torch.tensor(VALUES, device="cpu")
    return torch.stack([values[byte & 15], values[byte >> 4]], -1).view(torch.int64).reshape(256).to(device)


@cache
def _table() -> Tensor:
    """The sixteen values under each scale, in bfloat16."""
    scales = torch.arange(256, device="cpu").to(torch.uint8)
    return (torch.tensor(VALUES, device="cpu") * powers_of_two(scales)[:, None]).to(torch.bfloat16)
