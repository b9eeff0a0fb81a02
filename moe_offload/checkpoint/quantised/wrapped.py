"""`WrappedWeight`: the base of packed parameters that compute in another way than the one they wrap."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...experts import RowCodes
from .weights import MatrixWeight


@dataclass(frozen=True, eq=False)  # a subclass says which of its instances are equal
class WrappedWeight:
    """`weight`, whose name, shape, dtype, format and recipe stay; a subclass says how it is unpacked and multiplied."""

    weight: MatrixWeight

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def format(self) -> str:
        return self.weight.format

    @property
    def recipe(self) -> str:
        return self.weight.recipe

    def row_codes(self, transposed: bool) -> RowCodes | None:
        """Of what the kernels of a device know nothing."""
        return None
