"""Products with the bits of torch.mm: of few rows as fast as memory gives the weights, of many as fast as a core adds.

Shapes: P token-expert pairs, S slots, I inputs, O outputs of one matrix.

In which order torch adds up is tried out for each kind of product (`packed/exact.py`: `find_order`), and the kernel
adds up in the same one (`packed/compiled/in_order/`); on an older processor it is the same for any number of rows
(`packed/in_lanes.py`). Where it is unknown, the product is torch's.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...packed import in_lanes
from ...packed.exact import FEW, LARGE, Run, find_order, load_dense_kernels

_of_thread = threading.local()


def try_products(shapes: Collection[tuple[int, int]], turned_shapes: Collection[tuple[int, int]] = ()) -> bool:
    """Try out the products with large matrices [O, I], and with [I, O]. Whether there is one that our kernels are to
    take. All are tried: later there may be no memory for it."""
    found = [in_lanes.is_in_lanes(*shape) for shape in shapes]
    found += [in_lanes.is_in_parts(outputs, inputs) for inputs, outputs in turned_shapes]
    rows = range(1, FEW + 1)
    found += [find_order(some, *shape, torch.bfloat16, turned=False) is not None for shape in shapes for some in rows]
    return any(found)


def multiply(x_PI: Tensor, weight_SIO: Tensor, runs: Sequence[Run], out_PO: Tensor) -> Sequence[Run]:
    """Write x @ W of each run (slot, begin, end) as torch.mm would, all of as many pairs at once. Returns the runs that
    torch is to compute itself, for which nothing is written."""
    _, inputs, outputs = weight_SIO.shape
    if not (
        outputs * inputs >= LARGE
        and x_PI.dtype == weight_SIO.dtype == out_PO.dtype == torch.bfloat16
        and x_PI.device.type == weight_SIO.device.type == "cpu"
        and x_PI.shape[1] == inputs
        and x_PI.stride() == (inputs, 1)
        and out_PO.stride(1) == 1
        and not (x_PI.is_neg() or weight_SIO.is_neg())
    ):
        return runs
    if weight_SIO.stride()[1:] == (outputs, 1) and in_lanes.is_in_parts(outputs, inputs):
        in_lanes.multiply_turned_runs(x_PI, weight_SIO, runs, out_PO)
        return []
    if weight_SIO.stride()[1:] != (1, inputs):
        return runs
    if in_lanes.is_in_lanes(outputs, inputs):
        in_lanes.multiply_runs(x_PI, weight_SIO.transpose(1, 2), runs, out_PO)
        return []
    return _multiply_in_order(x_PI, weight_SIO, runs, out_PO)


@contextmanager
def each_as_alone() -> Iterator[None]:
    """Inside, in this thread, each row of a product has the bits that torch.mm gives it alone (`is_as_alone`): oneDNN
    adds up one row in another order than several."""
    _of_thread.as_alone = True
    try:
        yield
    finally:
        _of_thread.as_alone = False


def is_as_alone(outputs: int, inputs: int, rows: int) -> bool:
    """Whether `each_as_alone` holds for so many rows times a bfloat16 matrix [O, I] seen as [I, O]."""
    if in_lanes.is_in_lanes(outputs, inputs):
        return True
    tried = 1 if outputs * inputs >= LARGE else rows  # of smaller ones torch computes
    orders = {find_order(some, outputs, inputs, torch.bfloat16, turned=False) for some in range(1, tried + 1)}
    return len(orders) == 1 and None not in orders


def _multiply_in_order(x_PI: Tensor, weight_SIO: Tensor, runs: Sequence[Run], out_PO: Tensor) -> Sequence[Run]:
    _, inputs, outputs = weight_SIO.shape
    as_alone = getattr(_of_thread, "as_alone", False)
    if as_alone:
        runs = [(slot, i, min(i + FEW, end)) for slot, begin, end in runs for i in range(begin, end, FEW)]
    left, some = [], defaultdict(list)
    for run in runs:
        some[run[2] - run[1]].append(run)
    for pairs, alike in some.items():
        rows = 1 if as_alone else pairs
        order = find_order(rows, outputs, inputs, x_PI.dtype, turned=False) if pairs <= FEW else None
        if order is None:
            left += alike
        else:
            load_dense_kernels().multiply_runs(x_PI, weight_SIO.transpose(1, 2), alike, out_PO, order)
    return left
