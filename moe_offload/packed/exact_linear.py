"""In which order torch adds up a dense linear layer of few rows: tried out once for each kind of layer.

Shapes: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .exact import ORDERS, STEP, TILE, Order, multiplier, switches, trials

#: Up to so many elements a matrix is made up to try. A larger one (an output head) is tried itself.
MADE_UP = 1 << 24
#: Results that are compared where products do not cancel: another order changes one of some ten thousand.
COMPARED = 1 << 18
SMALL_BIAS = 2.0**-20  # as large as the rounding that is left where products cancel
TINY = 2.0**-122

_found: dict[Hashable, Order | None] = {}


def find_linear_order(weight_OI: Tensor, rows: int, biased: bool, dim: int) -> Order | None:
    """In which order `functional.linear` adds up x [M, I], or, where `dim` is more than 2, [1, M, I].

    None where it is none of `ORDERS`, or was not tried: more than one row of a matrix too large to try often.
    """
    (outputs, inputs), kernel = weight_OI.shape, multiplier()
    made_up = outputs * inputs <= MADE_UP
    if kernel is None or inputs % STEP or outputs < TILE or (rows > 1 and not made_up):
        return None
    flat = dim == 2
    key = (outputs, inputs, rows, biased, flat, switches())
    if key not in _found:
        tried = trials(rows, outputs, inputs, torch.bfloat16) if made_up else _trials_of(weight_OI)
        orders = list(ORDERS)
        for x_MI, matrix_OI in tried:
            bias_O = x_MI.new_full((outputs,), SMALL_BIAS) * matrix_OI[:, 0] if biased else None
            expected = functional.linear(x_MI if flat else x_MI[None], matrix_OI, bias_O).view(-1, outputs)
            out_MO, found = torch.empty_like(expected), []
            for order in orders:
                kernel(x_MI, matrix_OI, out_MO, *order, bias_O)
                if torch.equal(out_MO, expected):
                    found.append(order)
            orders = found
            if not orders:
                break
        _found[key] = orders[0] if orders else None
    return _found[key]


def _trials_of(weight_OI: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows for a matrix that is there: so many that another order of sums shows, and one of tiny numbers."""
    generator = torch.Generator().manual_seed(0)
    count = max(2, -(-COMPARED // len(weight_OI)))
    for size in (*[1.0] * count, TINY):
        yield torch.randn((1, weight_OI.shape[1]), generator=generator).bfloat16() * size, weight_OI
