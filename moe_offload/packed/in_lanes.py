"""Products that torch computes by loops of its own, on a processor without AVX512: the same bits, far sooner.

Shapes: M rows, I inputs, O outputs; P token-expert pairs, S slots.

Without AVX512 oneDNN has no kernels for bfloat16, and torch's loops take each element by itself: 11 GFLOP/s of a core
that has 90. They keep a sum in 64 lanes, whatever the numbers of rows and outputs (`compiled/in_lanes/steps.py`). That
this is so is tried out once for each kind of product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .exact import EDGE, Run, switches, trials
from .exact_linear import choose_some, make_cancel

LANES = 64
LEAST_OUTPUTS = 12
ROWS = (1, 2, 5, 33)  # numbers of rows that are tried: decode, and prompts
LARGE = 1 << 24  # elements from which on a matrix is itself tried with one row, and some of its outputs with more
SOME = 4096  # outputs of those
SMALL_BIAS = 2.0**-20  # as large as the rounding that is left where products cancel

_known: dict[Hashable, bool] = {}


@cache
def load_kernels() -> Any:
    """The module of kernels; None where numba or the processor has none, or where torch asks oneDNN."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    try:
        from .compiled.in_lanes import dense
    except ImportError:  # as in formats.py
        return None
    return dense if dense.can_run() else None


def is_in_lanes(outputs: int, inputs: int) -> bool:
    """Whether x [M, I] times a bfloat16 matrix [O, I] seen as [I, O] is added up so, for any M."""
    return _is_known(("product", outputs, inputs), outputs, inputs, lambda x, w, _: torch.mm(x, w.t()), False)


def linear_is_in_lanes(weight_OI: Tensor, biased: bool, dim: int) -> bool:
    """The same of `functional.linear` with x [M, I], or, where `dim` is 3, [1, M, I]."""
    outputs, inputs = weight_OI.shape
    if dim not in (2, 3):
        return False

    def multiply(x_MI: Tensor, matrix_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return functional.linear(x_MI if dim == 2 else x_MI[None], matrix_OI, bias_O).view(-1, len(matrix_OI))

    key = ("linear", outputs, inputs, biased, dim)
    if weight_OI.numel() <= LARGE:
        return _is_known(key, outputs, inputs, multiply, biased)
    return _is_known(key, SOME, inputs, multiply, biased) and _is_itself(key, weight_OI, multiply, biased)


def multiply_runs(x_PI: Tensor, weight_SOI: Tensor, runs: Sequence[Run], out_PO: Tensor) -> None:
    """For each run (slot, begin, end) write x @ W.T of the pairs and the matrix in that slot, as torch.mm would."""
    load_kernels().multiply_runs(x_PI, weight_SOI, runs, out_PO)


def multiply(x_MI: Tensor, weight_OI: Tensor, out_MO: Tensor, bias_O: Tensor | None = None) -> None:
    """Write x @ W.T, and the bias added last. All bfloat16, rows in one piece."""
    load_kernels().multiply(x_MI, weight_OI, out_MO, bias_O)


Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _is_known(key: Hashable, outputs: int, inputs: int, theirs: Multiply, biased: bool) -> bool:
    if load_kernels() is None or inputs % LANES or outputs < LEAST_OUTPUTS:
        return False
    key = (key, switches())
    if key not in _known:
        with torch.no_grad():
            _known[key] = all(
                _are_equal(x_MI[:rows], matrix_OI, theirs, _bias(x_MI, matrix_OI) if biased else None)
                for x_MI, matrix_OI in trials(max(ROWS), outputs, inputs, torch.bfloat16)
                for rows in ROWS
            )
    return _known[key]


def _is_itself(key: Hashable, weight_OI: Tensor, theirs: Multiply, biased: bool) -> bool:
    """By one row whose products with some of the outputs cancel, compared with all outputs."""
    key = (key, switches(), "itself")
    if key not in _known:
        rows_SI = weight_OI[choose_some(*weight_OI.shape)]
        x_1I = torch.randn((1, weight_OI.shape[1]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.no_grad():
            _known[key] = bool(rows_SI.isfinite().all()) and all(
                _are_equal(x, weight_OI, theirs, _bias(x, weight_OI) if biased else None)
                for x in (x_1I.bfloat16(), make_cancel(rows_SI, x_1I))
            )
    return _known[key]


def _are_equal(x_MI: Tensor, matrix_OI: Tensor, theirs: Multiply, bias_O: Tensor | None) -> bool:
    expected = theirs(x_MI, matrix_OI, bias_O)
    ours = torch.empty_like(expected)
    multiply(x_MI, matrix_OI, ours, bias_O)
    return torch.equal(ours, expected)


def _bias(x_MI: Tensor, matrix_OI: Tensor) -> Tensor:
    at_edge = bool(x_MI.abs().max() < SMALL_BIAS)  # then the bias is denormal
    return matrix_OI[:, 0] * (EDGE if at_edge else SMALL_BIAS)
