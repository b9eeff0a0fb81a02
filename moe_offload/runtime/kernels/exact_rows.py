"""Products with the bits of torch.mm: of few rows as fast as memory gives the weights, of many as fast as a core adds.

Shapes: P token-expert pairs, S slots, I inputs, O outputs of one matrix.

In which order torch adds up is tried out for each kind of product (`packed/exact.py`: `find_order`), and the kernel
adds up in the same one (`packed/compiled/in_order/`); on an older processor it is the same for any number of rows
(`packed/in_lanes.py`). Where it is unknown, the product is torch's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...packed import in_lanes
from ...packed.exact import FEW, LARGE, Run, find_order, load_dense_kernels


def try_products(shapes: Iterable[tuple[int, int]]) -> bool:
    """Try out the products with large matrices [O, I]. Whether there is one that our kernel is to take."""
    shapes = list(shapes)
    in_order = [in_lanes.is_in_lanes(*shape) for shape in shapes]  # each is tried: not later, with all memory taken
    orders = [find_order(rows, *shape, torch.bfloat16, turned=False) for shape in shapes for rows in range(1, FEW + 1)]
    return any(in_order) or any(order is not None for order in orders)


def multiply(x_PI: Tensor, weight_SIO: Tensor, runs: Sequence[Run], out_PO: Tensor) -> Sequence[Run]:
    """Write x @ W of each run (slot, begin, end) as torch.mm would, all of as many pairs at once. Returns the runs that
    torch is to compute itself, for which nothing is written."""
    _, inputs, outputs = weight_SIO.shape
    if not (
        outputs * inputs >= LARGE
        and weight_SIO.stride()[1:] == (1, inputs)
        and x_PI.dtype == weight_SIO.dtype == out_PO.dtype == torch.bfloat16
        and x_PI.device.type == weight_SIO.device.type == "cpu"
        and x_PI.shape[1] == inputs
        and x_PI.stride() == (inputs, 1)
        and out_PO.stride(1) == 1
    ):
        return runs
    if in_lanes.is_in_lanes(outputs, inputs):
        in_lanes.multiply_runs(x_PI, weight_SIO.transpose(1, 2), runs, out_PO)
        return []
    left, some = [], defaultdict(list)
    for run in runs:
        some[run[2] - run[1]].append(run)
    for pairs, alike in some.items():
        order = find_order(pairs, outputs, inputs, x_PI.dtype, turned=False) if pairs <= FEW else None
        if order is None:
            left += alike
        else:
            load_dense_kernels().multiply_runs(x_PI, weight_SIO.transpose(1, 2), alike, out_PO, order)
    return left
