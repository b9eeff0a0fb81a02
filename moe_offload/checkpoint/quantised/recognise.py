"""The format of one matrix, told from the names, dtypes and shapes of its tensors.

    gate_proj.weight         F8_E4M3 [O, I]      gate_proj.weight_scale_inv   F32 [O / 128, I / 128]    fp8
    gate_proj.weight_packed  I32 [O, I / 8]      gate_proj.weight_scale       BF16 [O, I / 32]          int4
    gate_up_proj_blocks      U8 [O, G, 16]       gate_up_proj_scales          U8 [O, G]                 mxfp4

The configuration is not asked: what the tensors are decides how they are read, as it does in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...errors import CheckpointError, UnsupportedModelError
from ...packed import FORMATS, Format
from ..headers import DTYPE_NAMES, TensorRange

#: What a tensor's name ends in -> what it is. Those that are "unused" play no part where weights are dequantised.
ROLES = {
    "weight_packed": "codes", "weight": "codes", "blocks": "codes",
    "weight_scale_inv": "scales", "weight_scale": "scales", "scales": "scales",
    "activation_scale": "unused", "input_scale": "unused", "weight_shape": "unused",
    "weight_zero_point": "zero points", "weight_g_idx": "an order of its own", "weight_global_scale": "a global scale",
}  # fmt: skip
_ENDING = re.compile("(?:^|[._])(" + "|".join(sorted(ROLES, key=len, reverse=True)) + r")\$?$")
BY_CODES = {torch.uint8: "mxfp4", torch.int8: "mxfp4", torch.int32: "int4", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class Recognised:
    """`shape` is [O, I] of the unpacked matrix."""

    format: Format
    shape: tuple[int, int]


def role_of(label: str) -> tuple[str, str]:
    """A source's name, cut into its matrix and its role: ('gate_proj', 'scales') of 'gate_proj.weight_scale'."""
    found = _ENDING.search(label)
    if found is None:
        return label, "codes"
    return label[: found.start()], ROLES[found[1]]


def recognise_format(matrix: str, parts: Mapping[str, TensorRange], keys: Mapping[str, str]) -> Recognised | None:
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
    kind = FORMATS.get(BY_CODES.get(codes.dtype, ""))
    if kind is None:
        raise CheckpointError(
            f"{codes.file}: {keys['codes']!r} is {_shown(codes)} with scales {keys['scales']!r}; no format that is "
            f"read has such codes. The formats are {', '.join(FORMATS)}"
        )
    tensors = [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in (codes, scales)]
    try:
        found = kind.fit(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{scales.file}: {keys['scales']!r}, the scales of {keys['codes']!r}: {error}") from None
    return Recognised(found, found.shape(tensors))


def _shown(found: TensorRange) -> str:
    return f"{DTYPE_NAMES[found.dtype]} {list(found.shape)}"
