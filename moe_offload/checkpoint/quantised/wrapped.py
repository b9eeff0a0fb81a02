"""What is said of a packed parameter however it is computed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .weights import MatrixWeight


@dataclass(frozen=True, eq=False)  # a subclass says which of them are the same
class WrappedWeight:
    """`weight`, unpacked or multiplied in another way."""

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
