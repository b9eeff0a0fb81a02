"""A parameter that rests as the tensors of its checkpoint, and is unpacked where it is used.

    gate_up_proj [2I, H]   <-  gate [I, H] = FP8(gate_proj.weight, its scales),  up [I, H] = ...;  Join(0)
    gate_up_proj [H, 2I]   <-  MXFP4(gate_up_proj_blocks, _scales) [2I, H];                        Swap(0, 1)

Shapes: M pairs, I inputs, O outputs of a product; a matrix of the file is [O, I].

A product needs the matrix as the file has it, rows of outputs: one row of x goes through strips of it that stay in the
cache of a core. Everything here gives the bits that the product with the whole, unpacked parameter has; what that
depends on in torch's kernels is tried out once (`packed/exact.py`), and not relied on where it does not hold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ...experts import Field, RowCodes
from ...packed import FORMATS, Format
from ...packed.exact import FEW, STRIP_BYTES, Order, Run, find_order, strips_are_exact, transposed_is_exact
from ...packed.fp8 import FLOATS
from ...packed.fused import grid_of_scales
from ...packed.in_lanes import is_in_lanes, is_in_parts, multiply_exactly
from ...packed.ordered import Place, multiply_rows_in_order, shape_for_kernels
from ...packed.workspace import borrow_workspace
from ..conversion import Conversion, Swap, convert_tensors, joins_bytes


@dataclass(frozen=True)
class Matrix:
    """One matrix [O, I] of the file: its tensors are `fields` of the row."""

    format: Format
    fields: tuple[Field, ...]
    shape: tuple[int, int]

    def tensors(self, row: Tensor) -> list[Tensor]:
        return [field.view_in(row) for field in self.fields]

    @cached_property
    def place(self) -> Place:
        """Where it lies in a row, for kernels."""
        alike = [torch.empty(field.shape, dtype=field.dtype, device="meta") for field in self.fields]
        codes, scales = self.fields
        return Place(codes.offset, scales.offset, self.shape[0], shape_for_kernels(self.format, alike))


@dataclass(frozen=True)
class MatrixWeight:
    """A parameter that `conversions` make of `matrices`. It is a `PackedWeight` (experts/layout.py)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    matrices: tuple[Matrix, ...]
    conversions: tuple[Conversion, ...]

    @property
    def rows(self) -> int:
        """O of all matrices together, one below the other."""
        return sum(matrix.shape[0] for matrix in self.matrices)

    @property
    def format(self) -> str:
        return type(self.matrices[0].format).__name__

    @property
    def recipe(self) -> str:
        formats = [f"{matrix.format!r} {matrix.shape}" for matrix in self.matrices]
        return f"{self.name} = {', '.join(formats)}; {self.conversions!r}"

    @property
    def workspace_bytes(self) -> int:
        """What unpacking takes at once: the matrices and, where they are reordered, the parameter beside them."""
        whole = math.prod(self.shape) * self.dtype.itemsize
        if joins_bytes(self.conversions):
            return whole
        return whole + STRIP_BYTES if self.conversions == (Swap(0, 1),) else 2 * whole

    def unpack(self, row: Tensor, out: Tensor) -> None:
        if joins_bytes(self.conversions):
            self._unpack_below(row, out)
            return
        if self.conversions == (Swap(0, 1),):
            [matrix] = self.matrices
            matrix.format.unpack_turned(matrix.tensors(row), out)
            return
        parts = [torch.empty(matrix.shape, dtype=self.dtype, device=out.device) for matrix in self.matrices]
        for matrix, part in zip(self.matrices, parts, strict=True):
            matrix.format.unpack(matrix.tensors(row), part)
        out.copy_(convert_tensors(self.conversions, parts))

    def row_codes(self, transposed: bool) -> RowCodes | None:
        by_rows = transposed if joins_bytes(self.conversions) else self.conversions == (Swap(0, 1),) and not transposed
        return self._row_codes if by_rows else None

    @cached_property
    def _row_codes(self) -> RowCodes | None:
        return row_codes(self.matrices, self.dtype)

    def multiply(self, x_PI: Tensor, rows_SB: Tensor, runs: Sequence[Run], out_PO: Tensor, transposed: bool) -> None:
        if x_PI.device.type != "cpu":  # what kernels of a device leave to the host, matrix by matrix
            whole = torch.empty(self.shape, dtype=self.dtype, device=x_PI.device)
            for slot, begin, end in runs:
                self.unpack(rows_SB[slot], whole)
                torch.mm(x_PI[begin:end], whole.t() if transposed else whole, out=out_PO[begin:end])
            return
        for slot, begin, end in self._multiply_in_order(x_PI, rows_SB, runs, out_PO, transposed):
            self._multiply_one(x_PI[begin:end], rows_SB[slot], out_PO[begin:end], transposed)

    def try_products(self) -> None:
        """Find out now what may be computed in another way: it takes memory that is not there once slots are full."""
        transposed = joins_bytes(self.conversions)
        ordered = [self._find_order(transposed, rows) is not None for rows in range(1, FEW + 1)]
        as_in_file = [self._as_in_file(transposed, rows) for rows in range(1, FEW + 1)]
        inputs = self.matrices[0].shape[1]
        if as_in_file[0] and not ordered[0] and self._strips_are_exact():
            for height in {*self._heights, self.rows}:
                is_in_lanes(height, inputs)
        if self.conversions == (Swap(0, 1),):
            is_in_parts(self.rows, inputs)

    def _find_order(self, transposed: bool, rows: int) -> Order | None:
        """In which order the product is added up, if its outputs are rows of the file's matrices."""
        below, turned = joins_bytes(self.conversions), self.conversions == (Swap(0, 1),)
        if not (transposed if below else turned and not transposed):
            return None
        return find_order(rows, self.rows, self.matrices[0].shape[1], self.dtype, turned=turned)

    def _multiply_in_order(
        self, x_PI: Tensor, rows_SB: Tensor, runs: Sequence[Run], out_PO: Tensor, transposed: bool
    ) -> list[Run]:
        """By our kernels, all runs of as many pairs at once. Returns the runs that are left."""
        left, some = [], defaultdict(list)
        for run in runs:
            some[run[2] - run[1]].append(run)
        for pairs, alike in some.items():
            order = self._find_order(transposed, pairs) if pairs <= FEW else None
            if order is None:
                left += alike
            else:
                places = [matrix.place for matrix in self.matrices]
                left += multiply_rows_in_order(places, x_PI, rows_SB, alike, out_PO, order)
        return left

    def _multiply_one(self, x_MI: Tensor, row: Tensor, out_MO: Tensor, transposed: bool) -> None:
        if not self._as_in_file(transposed, len(x_MI)):
            whole = borrow_workspace(self.shape, self.dtype)
            self.unpack(row, whole)
            multiply_exactly(x_MI, whole.t() if transposed else whole, out_MO)
        elif len(x_MI) == 1 and self._strips_are_exact():
            self._multiply_in_strips(x_MI, row, out_MO)
        else:
            whole = borrow_workspace((self.rows, x_MI.shape[1]), self.dtype)
            self._unpack_below(row, whole)
            multiply_exactly(x_MI, whole.t(), out_MO)

    def _as_in_file(self, transposed: bool, rows: int) -> bool:
        """Whether the product's outputs are rows of the file's matrices, and may be computed from them."""
        if joins_bytes(self.conversions):
            return transposed
        swapped = self.conversions == (Swap(0, 1),) and not transposed
        return swapped and transposed_is_exact(rows, self.rows, self.matrices[0].shape[1], self.dtype)

    def _unpack_below(self, row: Tensor, out_OI: Tensor) -> None:
        first = 0
        for matrix in self.matrices:
            matrix.format.unpack(matrix.tensors(row), out_OI[first : first + matrix.shape[0]])
            first += matrix.shape[0]

    @cached_property
    def _strips(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Rows [begin, end) of the strips of each matrix: whole blocks of scales."""
        found = []
        for matrix in self.matrices:
            (outputs, inputs), unit = matrix.shape, matrix.format.row_unit
            height = max(unit, STRIP_BYTES // (inputs * self.dtype.itemsize) // unit * unit)
            found.append(tuple((begin, min(begin + height, outputs)) for begin in range(0, outputs, height)))
        return tuple(found)

    @cached_property
    def _heights(self) -> tuple[int, ...]:
        return tuple(end - begin for strips in self._strips for begin, end in strips)

    def _strips_are_exact(self) -> bool:
        return strips_are_exact(self._heights, self.matrices[0].shape[1], self.dtype)

    def _multiply_in_strips(self, x_1I: Tensor, row: Tensor, out_1O: Tensor) -> None:
        space, first = borrow_workspace((max(self._heights), x_1I.shape[1]), self.dtype), 0
        for matrix, strips in zip(self.matrices, self._strips, strict=True):
            tensors = matrix.tensors(row)
            for begin, end in strips:
                strip = space[: end - begin]
                matrix.format.unpack(matrix.format.rows(tensors, begin, end), strip)
                multiply_exactly(x_1I, strip.t(), out_1O[:, first : first + end - begin])
                first += end - begin


def row_codes(matrices: Sequence[Matrix], dtype: torch.dtype) -> RowCodes | None:
    """Where the matrices lie, if they are alike and as far apart from one to the next: `RowCodes` can say no more."""
    first = matrices[0]
    codes, scales = first.fields
    size = scales.dtype.itemsize
    alike = {(m.shape, type(m.format), *((f.shape, f.dtype) for f in m.fields)) for m in matrices}
    steps = {
        tuple(after.offset - before.offset for before, after in zip(one.fields, following.fields, strict=True))
        for one, following in pairwise(matrices)
    }
    if len(alike) > 1 or len(steps) > 1 or any(m.fields[1].offset % size for m in matrices) or dtype not in FLOATS:
        return None
    [(codes_step, scales_step)] = steps or {(0, 0)}
    tensors = [torch.empty(field.shape, dtype=field.dtype, device="meta") for field in first.fields]
    return RowCodes(
        next(name for name, kind in FORMATS.items() if kind is type(first.format)),
        *first.shape,
        len(matrices),
        codes.offset,
        codes_step,
        scales.offset // size,
        scales_step // size,
        grid_of_scales(first.format, tensors),
        scales.dtype,
        dtype,
    )


def find_fault(weights: Sequence[MatrixWeight], row: Tensor) -> str | None:
    """What of a row's codes means no number, and in which tensor; None where all is well."""
    for weight in weights:
        for matrix in weight.matrices:
            found = matrix.format.find_fault(matrix.tensors(row))
            if found is not None:
                return f"{matrix.fields[0].name.partition('.')[2]}: {found}"
    return None
