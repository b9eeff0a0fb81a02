"""int4 of compressed-tensors, symmetric: eight 4-bit integers in a word, lowest nibble first, each plus 8.

    codes   int32   [O, I/8]
    scale   bfloat16, float16 or float32   [O, I/g] of each group of g columns, or [O, 1] of each row

The product has the dtype of the scale, and is converted to what is asked for afterwards: two roundings where they
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats import Format, Kernels, place_of

PER_WORD = 8
SCALES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Int4(Format):
    @classmethod
    def fit(cls, tensors: Sequence[Tensor]) -> Int4:
        codes, scale = tensors
        if codes.dtype != torch.int32 or scale.dtype not in SCALES:
            raise CheckpointError(
                f"int4 codes of {codes.dtype} with a scale of {scale.dtype}: codes are int32, a scale is bfloat16, "
                "float16 or float32. The checkpoint is damaged, or in another format"
            )
        right = codes.dim() == scale.dim() == 2 and codes.shape[0] == scale.shape[0] and scale.shape[1] > 0
        # A group of part of a word does not occur, and the kernels take whole words.
        right = right and codes.shape[1] > 0 and codes.shape[1] % scale.shape[1] == 0
        if not right:
            raise CheckpointError(
                f"int4 codes of shape {list(codes.shape)} with a scale of shape {list(scale.shape)}: codes are "
                "[O, I / 8], the scale [O, groups] whose groups are whole words of codes. The groups cannot be told"
            )
        return cls()

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        outputs, words = tensors[0].shape
        return outputs, words * PER_WORD

    def unpack_at_once(self, tensors: Sequence[Tensor], out_OI: Tensor) -> None:
        codes, scale = tensors
        pairs = torch.index_select(_pairs(codes.device), 0, codes.contiguous().view(torch.uint8).reshape(-1).int())
        values_OGJ = pairs.view(torch.float32).view(*scale.shape, -1)
        out_OI.copy_((values_OGJ * scale.to(torch.float32)[..., None]).to(scale.dtype).flatten(-2))

    def unpack_compiled(self, kernels: Kernels, tensors: Sequence[Tensor], out_OI: Tensor) -> bool:
        known = tensors[1].dtype in kernels.unpack.SCALES
        if known:
            kernels.unpack.unpack_int4(*tensors, out_OI)
        return known

    def find_fault(self, tensors: Sequence[Tensor]) -> str | None:
        place = place_of(~torch.isfinite(tensors[1]))
        if place is None:
            return None
        return f"the scale of row {place[0]}, group {place[1]} is {tensors[1][place].item()}, which is no finite number"


@cache
def _pairs(device: torch.device) -> Tensor:
    """Byte -> its two values in float32, as one int64."""
    byte = torch.arange(256, device="cpu")
    return torch.stack([(byte & 15) - 8, (byte >> 4) - 8], -1).float().view(torch.int64).reshape(256).to(device)
