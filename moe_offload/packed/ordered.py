"""Products of few rows straight from the codes, with the bits that unpacking and torch's product would give.

    x @ W.T   where W = bfloat16(code values * scales) is never written

In which order torch adds up is tried out once for each kind of product (`exact.py`: `find_order`). Shapes: M rows, I
inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from .exact import Order, Run, load_dense_kernels
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
    kernels, shape = load_ordered_kernels(), shape_for_kernels(format, tensors)
    if shape is None or not can_be_compiled(tensors, out_MO):
        return False
    x = kernels.as_activations(x_MI, order.paired)
    product = kernels.Product(tensors[0].data_ptr(), tensors[1].data_ptr(), x.data_ptr(), out_MO.data_ptr())
    [done] = kernels.multiply_each([product], shape, len(x), out_MO.stride(0), *order)
    return bool(done)


class Place(NamedTuple):
    """Where a packed matrix lies in each row, in bytes; how many outputs it has; and `shape_for_kernels` of it."""

    codes: int
    scales: int
    outputs: int
    shape: Any


def multiply_rows_in_order(
    places: Sequence[Place], x_PI: Tensor, rows_SB: Tensor, runs: Sequence[Run], out_PO: Tensor, order: Order
) -> list[Run]:
    """For each run (slot, begin, end), all of as many pairs, write x @ W.T in that order of sums, where W are the
    matrices at `places` of the row in that slot, one below the other. As few pieces of work as there are shapes of
    matrices. Returns the runs for which what is written is of no worth: unusual groups or scales.
    """
    kernels, outputs = load_ordered_kernels(), sum(place.outputs for place in places)
    if tuple(out_PO.shape) != (len(x_PI), outputs):  # kernels take addresses
        raise ValueError(f"results of shape {list(out_PO.shape)}, not {[len(x_PI), outputs]}")
    if any(place.shape is None for place in places) or not can_be_compiled([rows_SB], out_PO):
        return list(runs)
    x = kernels.as_activations(x_PI, order.paired)
    row_bytes, x_bytes, rows, pairs = rows_SB.shape[1], x.stride(0) * x.element_size(), rows_SB.data_ptr(), x.data_ptr()
    products: dict[Any, list[Any]] = {}
    first = out_PO.data_ptr()
    out_bytes = out_PO.stride(0) * out_PO.element_size()
    for codes, scales, height, shape in places:
        products.setdefault(shape, []).extend(
            kernels.Product(
                rows + slot * row_bytes + codes,
                rows + slot * row_bytes + scales,
                pairs + begin * x_bytes,
                first + begin * out_bytes,
            )
            for slot, begin, _ in runs
        )
        first += height * out_PO.element_size()
    wrong: set[int] = set()
    _, begin, end = runs[0]
    for shape, some in products.items():
        done = kernels.multiply_each(some, shape, end - begin, out_PO.stride(0), *order)
        wrong |= {i % len(runs) for i, right in enumerate(done) if not right}
    return [runs[i] for i in sorted(wrong)]


def shape_for_kernels(format: Format, tensors: Sequence[Tensor]) -> Any:
    """What the kernels are told of a matrix whose tensors look like these; None where they leave it alone."""
    kernels = load_ordered_kernels()
    if kernels is None:
        return None
    (outputs, inputs), grid = format.shape(tensors), grid_of_scales(format, tensors)
    form, scale = FORMS.index(type(format)), tensors[1]
    if not kernels.takes(form, scale, grid, outputs, inputs):
        return None
    return kernels.Shape(form, kernels.SCALES[scale.dtype], grid, outputs, inputs)


@cache
def load_ordered_kernels() -> Any:
    """The module of compiled kernels, or None; imported late, as in formats.py."""
    if load_dense_kernels() is None:
        return None
    from .compiled.in_order import packed

    return packed
