"""In which order torch adds up a dense linear layer of few rows: tried out once for each kind of layer.

Shapes: M rows, I inputs, O outputs; S outputs that are looked at.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional

from .exact import EDGE, STEP, TILE, Order, multiplier, orders_of, repeats, same_bits, switches, the_only, trials

#: Up to so many elements a matrix is made up to try. A larger one (an output head) is tried itself.
MADE_UP = 1 << 24
LOOKED_AT = 64  # rows of a matrix that is tried itself whose products are made to cancel
SMALL_BIAS = 2.0**-20  # as large as the rounding that is left where products cancel
TINY = 2.0**-122

_found: dict[Hashable, Order | None] = {}


def find_linear_order(weight_OI: Tensor, rows: int, biased: bool, dim: int) -> Order | None:
    """In which order `functional.linear` adds up x [M, I], or, where `dim` is 3, [1, M, I].

    None where it is none of `ORDERS`, or was not tried: other dimensions, more than one row of a matrix too large to
    try often.
    """
    (outputs, inputs), made_up = weight_OI.shape, weight_OI.numel() <= MADE_UP
    if multiplier() is None or inputs % STEP or outputs < TILE or dim not in (2, 3) or (rows > 1 and not made_up):
        return None
    key = (outputs, inputs, rows, biased, dim, switches())
    if key not in _found:
        with torch.no_grad():
            _found[key] = _try_made_up(rows, weight_OI, biased, dim) if made_up else _try_itself(weight_OI, biased, dim)
    return _found[key]


def _try_made_up(rows: int, weight_OI: Tensor, biased: bool, dim: int) -> Order | None:
    (outputs, inputs), orders = weight_OI.shape, orders_of(weight_OI.shape[1])
    for x_MI, matrix_OI in trials(rows, outputs, inputs, torch.bfloat16):
        at_edge = bool(x_MI.abs().max() < SMALL_BIAS)  # then the bias is denormal
        bias_O = matrix_OI[:, 0] * (EDGE if at_edge else SMALL_BIAS) if biased else None
        expected = _multiply(x_MI, matrix_OI, bias_O, dim)
        orders = [order for order in orders if repeats(expected, x_MI, matrix_OI, order, bias_O)]
        if not orders:
            break
    return the_only(orders)


def _try_itself(weight_OI: Tensor, biased: bool, dim: int) -> Order | None:
    """By one row of tiny numbers, and one whose products with some of the outputs cancel, compared with all outputs."""
    (outputs, inputs), orders = weight_OI.shape, orders_of(weight_OI.shape[1])
    some_S = choose_some(outputs, inputs)
    rows_SI = weight_OI[some_S]
    if not rows_SI.isfinite().all():
        return None
    x_1I, kernel = random_row(inputs, outputs), multiplier()
    for x, size in ((x_1I.bfloat16() * TINY, TINY), (make_cancel(rows_SI, x_1I), SMALL_BIAS)):
        bias_O = weight_OI[:, 0] * size if biased else None
        expected, out_1S = _multiply(x, weight_OI, bias_O, dim), x.new_empty((1, len(some_S)))
        left = []
        for order in orders:
            kernel(x, rows_SI, out_1S, *order, None if bias_O is None else bias_O[some_S])
            if same_bits(out_1S, expected[:, some_S]):
                left.append(order)
        orders = left
    if len(orders) != 1:
        return None
    out_1O = torch.empty_like(expected)
    kernel(x, weight_OI, out_1O, *orders[0], bias_O)
    return orders[0] if same_bits(out_1O, expected) else None


def random_row(inputs: int, seed: int) -> Tensor:
    """[1, I] in float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, inputs), generator=generator, dtype=torch.float64, device="cpu")


def choose_some(outputs: int, inputs: int) -> Tensor:
    """Outputs [S] that are looked at: no more than `make_cancel` can please."""
    count = max(TILE, min(LOOKED_AT, inputs // 6))
    return torch.linspace(0, outputs - 1, count, dtype=torch.float64, device="cpu").long()


def make_cancel(rows_SI: Tensor, x_1I: Tensor) -> Tensor:
    """Activations with which the products of each of those rows add up to nearly zero: what is left of the sum shows
    its rounding, and so its order.

    A second third of the inputs makes up for what the first one gives, up to its rounding to bfloat16, and the last
    third for that.
    """
    rows, x_I = rows_SI.double(), x_1I[0].clone()
    order = torch.randperm(len(x_I), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    first, *others = order.tensor_split(3)
    x_I[torch.cat(others)] = 0
    x_I[first] = x_I[first].bfloat16().double()
    for part in others:
        wanted_S = -(rows @ x_I)
        x_I[part] = torch.linalg.lstsq(rows[:, part], wanted_S[:, None]).solution[:, 0].bfloat16().double()
    return x_I.bfloat16()[None]


def _multiply(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dim: int) -> Tensor:
    return functional.linear(x_MI if dim == 2 else x_MI[None], weight_OI, bias_O).view(-1, len(weight_OI))
