"""transformers' conversion operations, for one expert.

transformers converts stacked tensors `[E, ...]`. None of the operations it uses on experts mixes experts, so each has a
one-expert form: the same thing on every dimension but the first. A chain of those forms is a tuple of conversions; an
empty one, or one that only joins tensors end to end, means that the row's bytes are the file's bytes.

    [MergeModulelist(0), Concatenate(1)]  ->  (Join(0),)          gate [I, H], up [I, H]  ->  gate_up [2I, H]
    [Transpose(1, 2)]                     ->  (Swap(0, 1),)       [H, 2I]                 ->  [2I, H]
    [Interleave(1)]                       ->  (Regroup(0, ...),)  rows g0 u0 g1 u1        ->  g0 g1 u0 u1

Each conversion can be undone, which is how experts are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Join:
    """Concatenate the tensors along `dim`."""

    dim: int

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors, self.dim)]

    def undo(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return list(torch.split(tensor, [shape[self.dim] for shape in shapes], self.dim))


@dataclass(frozen=True)
class Swap:
    """Exchange two dimensions."""

    dim0: int
    dim1: int

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].transpose(self.dim0, self.dim1)]

    def undo(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return self([tensor])


@dataclass(frozen=True)
class Regroup:
    """Split `dim` into (n/2, 2) and exchange the two: alternating rows become two blocks. `inverse`: (2, n/2)."""

    dim: int
    inverse: bool

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        tensor, at = tensors[0], self.dim
        half = tensor.shape[at] // 2
        split = (2, half) if self.inverse else (half, 2)
        pairs = tensor.reshape(*tensor.shape[:at], *split, *tensor.shape[at + 1 :])
        return [pairs.transpose(at, at + 1).reshape(tensor.shape)]

    def undo(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return Regroup(self.dim, not self.inverse)([tensor])


Conversion = Join | Swap | Regroup


def convert_tensors(conversions: Sequence[Conversion], tensors: list[Tensor]) -> Tensor:
    """Convert one expert's source tensors to its field; the result may be a view."""
    for conversion in conversions:
        tensors = conversion(tensors)
    [tensor] = tensors
    return tensor


def restore_tensors(conversions: Sequence[Conversion], field: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The source tensors, of `shapes`, that `convert_tensors` would turn into `field`; they may be views of it."""
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    before = []
    for conversion in conversions:
        before.append([tuple(tensor.shape) for tensor in tensors])
        tensors = conversion(tensors)
    found = [field]
    for conversion, shapes_before in zip(reversed(conversions), reversed(before), strict=True):
        [tensor] = found
        found = conversion.undo(tensor, shapes_before)
    return found


def joins_bytes(conversions: Sequence[Conversion]) -> bool:
    """Whether the result's bytes are the sources' bytes, one after the other."""
    return all(conversion == Join(0) for conversion in conversions)


def keeps_memory(ops: Sequence[Any], conversions: Sequence[Conversion]) -> bool:
    """Whether transformers leaves a tensor where it is, by `ops` whose one-expert forms are these: each of the others
    that have none makes a stack, or joins."""
    return not conversions and all(type(op).__name__ == "Transpose" for op in ops)


def one_expert_conversions(
    ops: Sequence[Any], shapes: Sequence[Shape], wanted: Shape, parameter: str
) -> tuple[Conversion, ...]:
    """The conversions that turn one expert's tensors of `shapes` into a field of shape `wanted`.

    `ops` are the operations of a transformers `WeightConverter`, whose dimensions count the experts' one. `wanted` is
    needed because `Transpose(check_dims=True)` acts only on a tensor that does not have the parameter's shape yet.
    Raises `UnsupportedModelError` naming operation and parameter for one whose one-expert form is not known, and
    `ValueError` when the shapes do not go together or the result is not of shape `wanted`.
    """
    conversions: list[Conversion] = []
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    for op in ops:
        conversion = _one_expert_conversion(op, tensors, wanted, parameter)
        if conversion is not None:
            conversions.append(conversion)
            try:
                tensors = conversion(tensors)
            except (RuntimeError, IndexError) as error:  # torch's way of saying that the shapes are wrong
                raise ValueError(str(error)) from error
    found = [tuple(tensor.shape) for tensor in tensors]
    if found != [wanted]:
        raise ValueError(f"converted: {found}")
    return tuple(conversions)


def _one_expert_conversion(op: Any, tensors: list[Tensor], wanted: Shape, parameter: str) -> Conversion | None:
    """The one-expert form of `op`, or None where that is to do nothing."""
    # Imported here: it imports torch.distributed.tensor and Dynamo, which takes seconds, and only loading needs it.
    from transformers.core_model_loading import (
        Concatenate,
        ErnieFuseAndSplitTextVisionExperts,
        Interleave,
        MergeModulelist,
        Transpose,
    )

    rank = 1 + tensors[0].dim()

    def dim(stacked: int) -> int:
        if stacked % rank == 0:
            raise _unsupported(op, parameter, "it acts on the dimension of experts")
        return stacked % rank - 1

    # Exact types: a subclass may do something else.
    if type(op) is MergeModulelist and op.dim == 0:
        return None
    if type(op) is ErnieFuseAndSplitTextVisionExperts and op.stack_dim == 0:
        return Join(dim(op.concat_dim)) if len(tensors) > 1 else None
    if type(op) is Concatenate:
        return Join(dim(op.dim)) if len(tensors) > 1 else None
    if len(tensors) == 1 and type(op) is Transpose:
        done = op.check_dims and tuple(tensors[0].shape) == wanted
        return None if done else Swap(dim(op.dim0), dim(op.dim1))
    if len(tensors) == 1 and type(op) is Interleave:
        return Regroup(dim(op.dim), op.inverse)
    raise _unsupported(op, parameter, f"its form for one expert with {len(tensors)} source tensor(s) is not known")


def _unsupported(op: Any, parameter: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{parameter}: transformers builds it from the checkpoint with {op!r}; {why}, so one expert cannot be read on "
        "its own. Load the whole model with transformers and offload that, or report the model"
    )
