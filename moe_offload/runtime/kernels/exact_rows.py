"""Products of few rows with the bits of torch.mm, each weight read once as fast as memory gives it.

Shapes: M rows, I inputs, O outputs of one matrix.

In which order torch adds up is tried out for each kind of product (`packed/exact.py`: `find_order`), and the kernel
adds up in the same one (`packed/compiled/in_order.py`). Where it is unknown, the product is torch's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...packed.exact import FEW, LARGE, find_order, multiplier


def try_products(shapes: Iterable[tuple[int, int]]) -> bool:
    """Try out the products with large matrices [O, I]. Whether there is one that our kernel is to take."""
    orders = [find_order(rows, *shape, torch.bfloat16, turned=False) for shape in shapes for rows in range(1, FEW + 1)]
    return any(order is not None for order in orders)


def multiply(x_MI: Tensor, matrix_IO: Tensor, out_MO: Tensor) -> bool:
    """Write x @ matrix as torch.mm would. False, and nothing written, where that is to compute it itself."""
    inputs, outputs = matrix_IO.shape
    if not (
        len(x_MI) <= FEW
        and outputs * inputs >= LARGE
        and matrix_IO.stride() == (1, inputs)
        and x_MI.dtype == matrix_IO.dtype == out_MO.dtype == torch.bfloat16
        and x_MI.device.type == matrix_IO.device.type == "cpu"
        and x_MI.shape[1] == inputs
        and x_MI.stride() == (inputs, 1)
        and out_MO.stride(1) == 1
    ):
        return False
    order = find_order(len(x_MI), outputs, inputs, x_MI.dtype, turned=False)
    if order is not None:
        multiplier()(x_MI, matrix_IO.t(), out_MO, *order)
    return order is not None
