"""x @ W.T straight from the codes, on torch's threads: rows of outputs are shared, so sums never depend on how many."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from .dot import FP8, dot_row
from .pool import array_at, kernel, run, share
from .unpack import SCALES

MOST = 8  # tokens: above, the sums of a row fit into no registers


def multiply(form: int, tensors: tuple[Tensor, ...], grid: tuple[int, int], x_MI: Tensor, out_MO: Tensor) -> None:
    """`form` is one of `dot.py`; scales lie in a grid of (rows, blocks of one row). `x_MI`, `out_MO`: float32."""
    codes, scale = tensors
    (tokens, inputs), outputs = x_MI.shape, out_MO.shape[1]
    if form != FP8:  # even and odd columns of each step
        x_MI = x_MI.view(tokens, inputs // 32, 16, 2).transpose(-1, -2)
    x_MI = x_MI.contiguous()
    where = (codes.data_ptr(), scale.data_ptr(), x_MI.data_ptr(), out_MO.data_ptr())
    shape = (outputs, inputs, codes[0].numel() * codes.element_size(), outputs // grid[0], grid[1])
    job = (*where, *shape, scale.element_size() * grid[1])
    run(_kernel(form, SCALES[scale.dtype], tokens), outputs, job, outputs * inputs)


@cache
def _kernel(form: int, kind: int, tokens: int) -> Any:
    """Compiled for each number of tokens: their sums are registers."""

    @kernel
    def multiply(data):  # type: ignore[no-untyped-def]
        job, begin, end = share(data)
        outputs, inputs, row_bytes, block_rows, blocks, scale_bytes = job[4], job[5], job[6], job[7], job[8], job[9]
        sums = np.empty((tokens, 16), np.float32)
        out_MO = array_at(job[3], (tokens, outputs), np.float32)
        for row in range(begin, end):
            codes, scales = job[0] + row * row_bytes, job[1] + row // block_rows * scale_bytes
            steps = inputs // 32 // blocks
            dot_row(form, kind, tokens, codes, scales, blocks, steps, job[2], inputs * 4, sums.ctypes.data)
            for token in range(tokens):
                total = np.float32(0)
                for lane in range(16):
                    total += sums[token, lane]
                out_MO[token, row] = total

    return multiply
