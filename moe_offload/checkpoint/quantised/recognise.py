"""The format of one matrix, told from the names, dtypes and shapes of its tensors.

    gate_proj.weight         F8_E4M3 [O, I]      gate_proj.weight_scale_inv   F32 [O / 128, I / 128]    Fp8
    gate_proj.weight_packed  I32 [O, I / 8]      gate_proj.weight_scale       BF16 [O, I / 32]          Int4
    gate_up_proj_blocks      U8 [O, G, 16]       gate_up_proj_scales          U8 [O, G]                 Mxfp4

The configuration is not asked: what the tensors are decides how they are read, as it does in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import CheckpointError, UnsupportedModelError
from ...packed import Format, Fp8, Int4, Mxfp4
from ..headers import DTYPE_NAMES, TensorRange

#: What a tensor's name ends in -> what it is. Those that are "unused" play no part where weights are dequantised.
ROLES = {
    "weight_packed": "codes", "weight": "codes", "blocks": "codes",
    "weight_scale_inv": "scales", "weight_scale": "scales", "scales": "scales",
    "activation_scale": "unused", "input_scale": "unused", "weight_shape": "unused",
    "weight_zero_point": "zero points", "weight_g_idx": "an order of its own", "weight_global_scale": "a global scale",
}  # fmt: skip
_ENDING = re.compile("(?:^|[._])(" + "|".join(sorted(ROLES, key=len, reverse=True)) + r")\$?$")
_BYTES = (torch.uint8, torch.int8)
_E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)


@dataclass(frozen=True)
class Recognised:
    """`shape` is [O, I] of the unpacked matrix."""

    format: Format
    shape: tuple[int, int]


def role_of(label: str) -> tuple[str, str]:
    """A source's name, cut into that of its matrix and its role: ('gate_proj', 'scales') of 'gate_proj.weight_scale'."""
    found = _ENDING.search(label)
    if found is None:
        return label, "codes"
    return label[: found.start()], ROLES[found[1]]


def recognise(matrix: str, parts: Mapping[str, TensorRange], keys: Mapping[str, str]) -> Recognised | None:
    """The format of a matrix whose tensors are `parts`, by role; None where it is not quantised at all.

    `keys` are their names in the checkpoint, for messages. Raises `CheckpointError` naming tensor and file where the
    scales are missing or do not fit, `UnsupportedModelError` where the format is not read.
    """
    for role in parts:
        if role not in ("codes", "scales", "unused"):
            raise UnsupportedModelError(
                f"{parts[role].file}: {keys[role]!r} gives {matrix} {role}; transformers cannot load such experts. Use "
                "a checkpoint with symmetric weights in groups, or the bfloat16 original"
            )
    codes, scales = parts.get("codes"), parts.get("scales")
    if codes is None:
        other = next(iter(parts))
        raise CheckpointError(f"{parts[other].file}: has {keys[other]!r}, and no weights of {matrix} that it is for")
    if scales is None:
        if codes.dtype.is_floating_point and codes.dtype.itemsize > 1:
            return None
        raise CheckpointError(
            f"{codes.file}: {keys['codes']!r} is {_shown(codes)}, and the checkpoint has no scales for it. Download "
            "the missing shard, or the whole checkpoint again"
        )
    found = _find(codes, scales)
    if found is None:
        raise CheckpointError(
            f"{scales.file}: {keys['scales']!r} is {_shown(scales)}, which does not fit {keys['codes']!r}, "
            f"{_shown(codes)}; no format that is read has both. The checkpoint is damaged, or of a format that is not "
            "read: MXFP4, FP8 (blocks, rows, tensors) and symmetric int4 are"
        )
    return found


def _find(codes: TensorRange, scales: TensorRange) -> Recognised | None:
    if codes.dtype == torch.uint8 and len(codes.shape) == 3 and codes.shape[2] == 16:
        if scales.shape == codes.shape[:2] and scales.dtype in (torch.uint8, _E8M0):
            return Recognised(Mxfp4(), (codes.shape[0], codes.shape[1] * 32))
        return None
    if len(codes.shape) != 2:
        return None
    rows, columns = codes.shape
    if codes.dtype in _BYTES:
        fits = scales.shape == (rows, columns // 16) and columns % 16 == 0 and scales.dtype in (torch.uint8, _E8M0)
        return Recognised(Mxfp4(), (rows, columns * 2)) if fits else None
    if codes.dtype == torch.int32:
        inputs = columns * 8
        groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] == rows else 0
        fits = groups > 0 and inputs % groups == 0 and scales.dtype.is_floating_point and scales.dtype.itemsize > 1
        return Recognised(Int4(), (rows, inputs)) if fits else None
    if codes.dtype == torch.float8_e4m3fn:
        known = scales.dtype in (torch.uint8, _E8M0) or (scales.dtype.is_floating_point and scales.dtype.itemsize > 1)
        return Recognised(Fp8(), (rows, columns)) if known and _fits_grid((rows, columns), scales.shape) else None
    return None


def _fits_grid(shape: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether scales of shape `grid` lie over a matrix in equal blocks: one, one a row, or a whole number each way."""
    if len(grid) < 2:
        return tuple(grid) in ((), (1,))
    return len(grid) == 2 and all(n > 0 and size % n == 0 for size, n in zip(shape, grid, strict=True))


def _shown(found: TensorRange) -> str:
    return f"{DTYPE_NAMES[found.dtype]} {list(found.shape)}"
