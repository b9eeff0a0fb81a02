"""compute="exact" on a CPU: experts' products of few tokens at memory speed, with torch's bits."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from ..experts import MoELayer
from ..forward.graphs.products import serve_few_rows
from ..packed.exact import LARGE

logger = logging.getLogger("moe_offload")


def serve_exact(moe_layers: Iterable[MoELayer]) -> None:
    """Let graphs have such products, where a matrix is large enough to gain by them and torch's order of sums is known.

    Weights that rest packed see to themselves (`checkpoint/quantised/weights.py`).
    """
    shapes = {shape for moe in moe_layers for shape in _large_matrices(moe)}
    if not shapes:
        return
    try:
        from ..runtime.kernels import exact_rows
    except ImportError as error:  # numba, which was taken away or cannot be loaded
        logger.info("products of few tokens are torch's: numba cannot be used here: %s", error)
        return
    if exact_rows.try_products(sorted(shapes)):
        serve_few_rows(exact_rows.multiply)


def _large_matrices(moe: MoELayer) -> list[tuple[int, int]]:
    """[O, I] of each weight of an expert that is a large bfloat16 matrix, with rows of outputs."""
    if getattr(moe.modules[0], "is_transposed", False):
        return []
    return [
        (field.shape[0], field.shape[1])
        for field in moe.layout.fields
        if len(field.shape) == 2 and field.dtype == torch.bfloat16 and field.shape[0] * field.shape[1] >= LARGE
    ]
