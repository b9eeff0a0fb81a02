"""Products that torch computes by loops of its own, on a processor without AVX512: the same bits, far sooner.

Shapes: M rows, I inputs, O outputs; P token-expert pairs, S slots.

Without AVX512 oneDNN has no kernels for bfloat16, and torch's loops take each element by itself: 11 GFLOP/s of a core
that has 90, and 1 where outputs lie side by side. They keep a sum in 64 lanes (`compiled/in_lanes/steps.py`), there in
four parts (`turned_steps.py`), whatever the numbers of rows and outputs. That this is so is tried out once for each
kind of product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .exact import EDGE, Run, same_bits, switches, trials
from .exact_linear import choose_some, make_cancel, random_row

LANES = 64
LEAST_OUTPUTS = 24
ROWS = (1, 2, 5, 33)  # numbers of rows that are tried: decode, and prompts
LARGE = 1 << 24  # elements from which on a matrix is itself tried with one row, and some of its outputs with more
SOME = 4096  # outputs of those
FEW_OUTPUTS = 256  # of a matrix [I, O], tried with more than two rows
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


@cache
def load_turned_kernels() -> Any:
    """The module of those for matrices [I, O]; there is one wherever there are the others."""
    from .compiled.in_lanes import turned

    return turned


def is_in_lanes(outputs: int, inputs: int) -> bool:
    """Whether x [M, I] times a bfloat16 matrix [O, I] seen as [I, O] is added up so, for any M."""
    return _is_known(("product", outputs, inputs), outputs, inputs, lambda x, w, _: torch.mm(x, w.t()), multiply)


def is_in_parts(outputs: int, inputs: int) -> bool:
    """Whether x [M, I] times a bfloat16 matrix [I, O] is added up in four parts, for any M.

    With many rows some of the outputs are tried: torch takes a second for all of them.
    """

    def theirs(x_MI: Tensor, matrix_OI: Tensor, _: Tensor | None) -> Tensor:
        return torch.mm(x_MI, matrix_OI.t().contiguous())

    def ours(x_MI: Tensor, matrix_OI: Tensor, out_MO: Tensor, _: Tensor | None) -> None:
        multiply_turned_runs(x_MI, matrix_OI.t().contiguous()[None], [(0, 0, len(x_MI))], out_MO)

    few = _is_known(("turned", outputs, inputs), outputs, inputs, theirs, ours, rows=ROWS[:2])
    return few and _is_known(("turned", FEW_OUTPUTS, inputs), FEW_OUTPUTS, inputs, theirs, ours, rows=ROWS[2:])


def linear_is_in_lanes(weight_OI: Tensor, biased: bool, dim: int, *, is_slice: bool = False) -> bool:
    """The same of `functional.linear` with x [M, I], or, where `dim` is 3, [1, M, I]; `is_slice`: of the last tokens of
    a longer prompt. Of a weight on the meta device: whether there is no reason against it so far."""
    outputs, inputs = weight_OI.shape
    if dim not in (2, 3):
        return False

    def theirs(x_MI: Tensor, matrix_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        x = x_MI if dim == 2 else x_MI[None]
        if is_slice:
            x = torch.cat([x, x], dim=-2)[..., len(x_MI) :, :]
        return functional.linear(x, matrix_OI, bias_O).view(-1, len(matrix_OI))

    key = ("linear", outputs, inputs, biased, dim, is_slice)
    if weight_OI.numel() <= LARGE:
        return _is_known(key, outputs, inputs, theirs, multiply, biased=biased)
    known = _is_known(key, SOME, inputs, theirs, multiply, biased=biased)
    return known and (weight_OI.is_meta or _is_itself(key, weight_OI, theirs, biased))


def multiply_runs(x_PI: Tensor, weight_SOI: Tensor, runs: Sequence[Run], out_PO: Tensor) -> None:
    """For each run (slot, begin, end) write x @ W.T of the pairs and the matrix in that slot, as torch.mm would."""
    load_kernels().multiply_runs(x_PI, weight_SOI, runs, out_PO)


def multiply_turned_runs(x_PI: Tensor, weight_SIO: Tensor, runs: Sequence[Run], out_PO: Tensor) -> None:
    """The same of matrices [I, O]: x @ W."""
    load_turned_kernels().multiply_runs(x_PI, weight_SIO, runs, out_PO)


def multiply(x_MI: Tensor, weight_OI: Tensor, out_MO: Tensor, bias_O: Tensor | None = None) -> None:
    """Write x @ W.T, and the bias added last. All bfloat16, rows in one piece."""
    load_kernels().multiply(x_MI, weight_OI, out_MO, bias_O)


def multiply_exactly(x_MI: Tensor, weight_IO: Tensor, out_MO: Tensor) -> None:
    """torch.mm(x, W, out=out), by our kernels where torch's order of sums is known."""
    inputs, outputs = weight_IO.shape
    plain = x_MI.dtype == weight_IO.dtype == out_MO.dtype == torch.bfloat16
    if plain and x_MI.is_contiguous() and out_MO.stride(1) == 1 and not (x_MI.is_neg() or weight_IO.is_neg()):
        if weight_IO.stride() == (1, inputs) and is_in_lanes(outputs, inputs):
            multiply(x_MI, weight_IO.t(), out_MO)
            return
        if weight_IO.stride() == (outputs, 1) and is_in_parts(outputs, inputs):
            multiply_turned_runs(x_MI, weight_IO[None], [(0, 0, len(x_MI))], out_MO)
            return
    torch.mm(x_MI, weight_IO, out=out_MO)


Theirs = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Ours = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


def _is_known(
    kind: Hashable,
    outputs: int,
    inputs: int,
    theirs: Theirs,
    ours: Ours,
    *,
    rows: Sequence[int] = ROWS,
    biased: bool = False,
) -> bool:
    """Whether both give the same bits, for each of those numbers of rows."""
    if load_kernels() is None or inputs % LANES or outputs < LEAST_OUTPUTS:
        return False
    key = (kind, switches())
    if key not in _known:
        with torch.no_grad():
            _known[key] = all(
                _are_equal(x_MI[:some], matrix_OI, theirs, ours, _bias(x_MI, matrix_OI) if biased else None)
                for x_MI, matrix_OI in trials(max(rows), outputs, inputs, torch.bfloat16)
                for some in rows
            )
    return _known[key]


def _is_itself(kind: Hashable, weight_OI: Tensor, theirs: Theirs, biased: bool) -> bool:
    """By one row whose products with some of the outputs cancel, compared with all outputs."""
    key = (kind, switches(), "itself")
    if key not in _known:
        rows_SI = weight_OI[choose_some(*weight_OI.shape)]
        x_1I = random_row(weight_OI.shape[1], 0)
        with torch.no_grad():
            _known[key] = bool(rows_SI.isfinite().all()) and all(
                _are_equal(x, weight_OI, theirs, multiply, _bias(x, weight_OI) if biased else None)
                for x in (x_1I.bfloat16(), make_cancel(rows_SI, x_1I))
            )
    return _known[key]


def _are_equal(x_MI: Tensor, matrix_OI: Tensor, theirs: Theirs, ours: Ours, bias_O: Tensor | None) -> bool:
    expected = theirs(x_MI, matrix_OI, bias_O)
    out_MO = torch.empty_like(expected)
    ours(x_MI, matrix_OI, out_MO, bias_O)
    return same_bits(out_MO, expected)


def _bias(x_MI: Tensor, matrix_OI: Tensor) -> Tensor:
    at_edge = bool(x_MI.abs().max() < SMALL_BIAS)  # then the bias is denormal
    return matrix_OI[:, 0] * (EDGE if at_edge else SMALL_BIAS)
