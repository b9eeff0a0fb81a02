"""`Format`, the base of every format: what can be done with the tensors of one packed matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

#: Elements that are unpacked at once by torch operations: their float32 copies stay in the cache, and small.
AT_ONCE = 1 << 18

F = TypeVar("F", bound="Format")


@dataclass(frozen=True)
class Format(ABC):
    """One way to pack a matrix [O, I]. The codes are the first of its tensors, the scales the second.

    Raises CheckpointError, by `fit`, where shapes or dtypes of the two do not belong together.
    """

    #: A slice of rows begins and ends at multiples of this, so that no block of scales is cut.
    row_unit: int = 1

    @classmethod
    @abstractmethod
    def fit(cls: type[F], tensors: Sequence[Tensor]) -> F:
        """The format of a matrix whose tensors look like these (meta tensors will do)."""

    @abstractmethod
    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        """(O, I) of the matrix."""

    def rows(self, tensors: Sequence[Tensor], begin: int, end: int) -> tuple[Tensor, ...]:
        """The tensors of output rows [begin, end), as views; both are multiples of `row_unit`, or O."""
        codes, scales = tensors
        return codes[begin:end], scales[begin:end]

    def unpack(self, tensors: Sequence[Tensor], out_OI: Tensor) -> None:
        """Write the matrix, in the dtype of `out_OI`, whose rows are contiguous."""
        if tuple(out_OI.shape) != self.shape(tensors):  # kernels write to addresses
            raise ValueError(f"a matrix of shape {list(self.shape(tensors))} cannot be written to {list(out_OI.shape)}")
        kernels = load_kernels() if can_be_compiled(tensors, out_OI) else None
        if kernels is None or not self.unpack_compiled(kernels, tensors, out_OI):
            self.unpack_torch(tensors, out_OI)

    def unpack_turned(self, tensors: Sequence[Tensor], out_IO: Tensor) -> None:
        """Write the transpose of the matrix, in the dtype of `out_IO`, whose rows are contiguous."""
        kernels = load_kernels() if can_be_compiled(tensors, out_IO) else None
        if kernels is not None and self.turn_compiled(kernels, tensors, out_IO):
            return
        for begin, end in self.strips(self.shape(tensors), AT_ONCE):  # each is turned while it is in the cache
            strip = torch.empty((end - begin, len(out_IO)), dtype=out_IO.dtype, device=out_IO.device)
            self.unpack(self.rows(tensors, begin, end), strip)
            out_IO[:, begin:end] = strip.t()

    def turn_compiled(self, kernels: Kernels, tensors: Sequence[Tensor], out_IO: Tensor) -> bool:
        """The same in one step. False where there is no kernel for it: only MXFP4 experts rest the other way round."""
        return False

    @abstractmethod
    def unpack_compiled(self, kernels: Kernels, tensors: Sequence[Tensor], out_OI: Tensor) -> bool:
        """The same bits in bfloat16 by a compiled kernel. False where there is none for these dtypes."""

    def unpack_torch(self, tensors: Sequence[Tensor], out_OI: Tensor) -> None:
        """The same bits by torch operations, on any device and in any dtype."""
        for begin, end in self.strips(self.shape(tensors), AT_ONCE):
            self.unpack_at_once(self.rows(tensors, begin, end), out_OI[begin:end])

    @abstractmethod
    def unpack_at_once(self, tensors: Sequence[Tensor], out_OI: Tensor) -> None:
        """The formula itself."""

    @abstractmethod
    def find_fault(self, tensors: Sequence[Tensor]) -> str | None:
        """The first code or scale that is no number, in words; None where there is none."""

    def strips(self, shape: tuple[int, int], elements: int) -> Iterator[tuple[int, int]]:
        """Rows [begin, end) of about so many elements each, cut where a slice may be cut."""
        outputs, inputs = shape
        step = max(elements // max(inputs, 1) // self.row_unit, 1) * self.row_unit
        for begin in range(0, outputs, step):
            yield begin, min(begin + step, outputs)


class Kernels(NamedTuple):
    """The modules of compiled kernels."""

    unpack: Any
    unpack_turned: Any
    scan: Any


@cache
def load_kernels() -> Kernels | None:
    """The compiled kernels, or None. Imported for the first matrix: importing numba takes as long as many a command."""
    try:
        from .compiled import scan, unpack, unpack_turned
    except ImportError:  # numba was taken away, or cannot be loaded: the formulas in torch are the same, and slower
        return None
    return Kernels(unpack, unpack_turned, scan)


def can_be_compiled(tensors: Sequence[Tensor], out_OI: Tensor) -> bool:
    """Whether a kernel can take these tensors. It works on addresses: contiguous, on a CPU, and bfloat16 comes out."""
    at_hand = all(tensor.device.type == "cpu" for tensor in (*tensors, out_OI))
    dense = all(tensor.is_contiguous() for tensor in tensors) and out_OI.stride(1) == 1
    return at_hand and dense and out_OI.dtype == torch.bfloat16


def has_byte(tensor: Tensor, *, signed: bool) -> bool:
    """Whether a tensor of one-byte elements has one of 0xff, or, of signed codes, of 0x7f or 0xff."""
    kernels = load_kernels() if tensor.device.type == "cpu" and tensor.is_contiguous() else None
    if kernels is not None:
        return bool(kernels.scan.has_byte(tensor, signed=signed))
    codes = tensor.view(torch.uint8)
    return bool(((codes | 0x80 if signed else codes) == 0xFF).any())


def powers_of_two(exponents: Tensor) -> Tensor:
    """e8m0 as float32: 2^(e - 127), where 0 is the subnormal 2^-127."""
    wide = exponents.view(torch.uint8).to(torch.int32)
    return torch.where(wide == 0, 1 << 22, wide << 23).view(torch.float32)


def place_of(wrong: Tensor) -> tuple[int, ...] | None:
    """The indices of the first True, or None."""
    if not bool(wrong.any()):
        return None
    return tuple(int(index) for index in wrong.nonzero()[0])
