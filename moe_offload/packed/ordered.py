"""Products of few rows straight from the codes, with the bits that unpacking and torch's product would give.

    x @ W.T   where W = bfloat16(code values * scales) is never written

In which order torch adds up is tried out once for each kind of product (`exact.py`: `find_order`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from .exact import Order
from .formats import Format, can_be_compiled
from .fused import FORMS, grid_of_scales


def multiply_in_order(format: Format, tensors: Sequence[Tensor], x_MI: Tensor, out_MO: Tensor, order: Order) -> bool:
    """Write x @ W.T in that order of sums. False, and nothing of worth written, for a matrix that the kernels leave
    alone: unusual groups or scales."""
    outputs, inputs = format.shape(tensors)
    if (tuple(x_MI.shape), tuple(out_MO.shape)) != (
        (len(x_MI), inputs),
        (len(x_MI), outputs),
    ):  # kernels take addresses
        raise ValueError(
            f"x {list(x_MI.shape)} times a matrix [{outputs}, {inputs}] is of shape [{len(x_MI)}, {outputs}], not "
            f"{list(out_MO.shape)}"
        )
    kernels = _compiled()
    if kernels is None or not can_be_compiled(tensors, out_MO):
        return False
    form, grid = FORMS.index(type(format)), grid_of_scales(format, tensors)
    if not kernels.takes(form, tensors[1], grid, outputs, inputs):
        return False
    return bool(kernels.multiply(form, tensors, grid, x_MI, out_MO, *order))


@cache
def _compiled() -> Any:
    try:
        from .compiled import in_order_packed
    except ImportError:  # as in formats.py
        return None
    return in_order_packed
