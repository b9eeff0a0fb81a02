"""The arithmetic of compute="packed": products straight from the codes of a packed matrix, where a user asks for it.

Weights are not rounded to bfloat16 and activations not at all: products and sums are in float32, so a result is nearer
to that of exact arithmetic than the bfloat16 product's, and not equal to it. It is for a few tokens; more of them share
the unpacked matrix. The same tensors give the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .formats import AT_ONCE, Format, can_be_compiled
from .fp8 import FP8, grid_of
from .int4 import Int4
from .mxfp4 import MXFP4

STEP = 32  # columns that a kernel takes at once
FORMS: list[type[Format]] = [MXFP4, FP8, Int4]  # by the number that kernels know them by


def multiply_fused(format: Format, tensors: Sequence[Tensor], x_MI: Tensor, out_MO: Tensor) -> None:
    """Write x @ W.T, computed in float32 and then rounded to the dtype of `out_MO`."""
    kernels = _load_kernels()
    (_, inputs), blocks = format.shape(tensors), grid_of_scales(format, tensors)
    x, out = x_MI.to(torch.float32), x_MI.new_empty(out_MO.shape, dtype=torch.float32)
    whole_steps = inputs % (STEP * blocks[1]) == 0
    at_hand = kernels is not None and can_be_compiled(tensors, x.new_empty((0, 1), dtype=torch.bfloat16))
    if not at_hand or not whole_steps or len(x) > kernels.MOST or tensors[1].dtype not in kernels.SCALES:
        tensors = _unrounded(format, tensors)
        for begin, end in format.strips(format.shape(tensors), AT_ONCE):
            weight_OI = x.new_empty((end - begin, inputs))
            format.unpack_torch(format.rows(tensors, begin, end), weight_OI)
            torch.mm(x, weight_OI.t(), out=out[:, begin:end])
    else:
        form = FORMS.index(type(format))
        kernels.multiply(form, tuple(tensors), blocks, x, out)
    out_MO.copy_(out)


def _unrounded(format: Format, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """int4 rounds a product to the dtype of its scale: with one of float32 nothing is lost."""
    return (tensors[0], tensors[1].to(torch.float32)) if isinstance(format, Int4) else tensors


def grid_of_scales(format: Format, tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Into how many blocks of one scale rows and columns are cut."""
    if isinstance(format, FP8):
        return grid_of(tensors[1])
    rows, groups = tensors[1].shape
    return rows, groups


@cache
def _load_kernels() -> Any:
    """The module of compiled kernels, or None; imported late, as in formats.py."""
    try:
        from .compiled import fused
    except ImportError:
        return None
    return fused
