"""Rows that must be finite: those of experts that are left out because their input is zero.

Zero times a finite weight is zero, and zero times infinity is NaN. An expert that gets no token then still reaches
every token of plain transformers, and none of ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..experts import MoELayer


def refuse_infinite(moe: MoELayer, expert: int, row: Tensor) -> None:
    """Raise `UnsupportedModelError` for a row [row_bytes], uint8, with a weight that is infinite or no number."""
    for field in moe.layout.fields:
        if field.dtype.is_floating_point and not torch.isfinite(field.view_in(row)).all():
            raise UnsupportedModelError(
                f"{moe.name}: {field.name} of expert {expert} has weights that are infinite or no numbers. In this "
                "model every expert is multiplied with every token, so plain transformers gives NaN for all of them, "
                "and here it would do so only where the expert is in use. Repair the checkpoint"
            )
