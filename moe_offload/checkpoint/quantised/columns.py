"""One parameter of every expert of a layer, where the checkpoint holds it quantised.

transformers puts a *dequantiser* in front of the operations by which it makes the parameter, and more sources beside
the weights. Here the dequantiser is left out: its sources are the row, and the weights' unpacking does its work later.

    [gate_proj.weight, gate_proj.weight_scale_inv, up_proj.weight ...] ->  [Fp8Dequantize, MergeModulelist, Concatenate]
    row: gate codes | gate scales | up codes | up scales        unpacked: gate, up -> (Join(0),) -> gate_up_proj
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CheckpointError, UnsupportedModelError
from ...experts import Field, MoELayer, RowLayout
from ...packed import FP8, Format
from ..conversion import Conversion, Shape, Swap, one_expert_conversions
from ..headers import TensorRange, files_of
from .recognise import Recognised, recognise_format, role_of
from .weights import Matrix, MatrixWeight

#: transformers' operations that are left to the unpacking, and the conversion that each does besides.
DEQUANTISERS: dict[str, tuple[Conversion, ...]] = {
    "Fp8Dequantize": (),
    "CompressedTensorsDequantize": (),
    "Mxfp4Dequantize": (Swap(0, 1),),
}
READ = ("codes", "scales")  # the roles whose tensors lie in a row, in this order


@dataclass(frozen=True)
class Sources:
    """One tensor of every expert: its source pattern in transformers' converter, and the pattern's name for it."""

    pattern: str | None
    label: str
    keys: Sequence[str]
    ranges: Sequence[TensorRange]


@dataclass(frozen=True)
class MadeBy:
    """How transformers itself makes a parameter: its converter, and the source pattern of each field of the row."""

    parameter: str
    converter: Any
    patterns: Mapping[str, str]
    stacked: bool


@dataclass(frozen=True)
class Packing:
    """How the rows of a layer rest: their layout, and the parameters that are unpacked from them."""

    layout: RowLayout
    weights: tuple[MatrixWeight, ...]
    made_by: Mapping[str, MadeBy]


@dataclass(frozen=True)
class PackedColumn:
    """A parameter as the row holds it: of each of its fields, in order, every expert's range. `dtype` is unpacked."""

    field: Field
    ranges: Mapping[str, Sequence[TensorRange]]
    dtype: torch.dtype
    matrices: Sequence[tuple[Recognised, tuple[str, ...]]]
    conversions: tuple[Conversion, ...]
    made_by: MadeBy

    @property
    def parts(self) -> list[tuple[str, Shape, torch.dtype]]:
        return [(name, ranges[0].shape, ranges[0].dtype) for name, ranges in self.ranges.items()]

    def weight(self, fields: Mapping[str, Field]) -> MatrixWeight:
        """The parameter, once it is settled where in the row its fields are."""
        matrices = tuple(
            Matrix(found.format, tuple(fields[name] for name in names), found.shape) for found, names in self.matrices
        )
        return MatrixWeight(self.field.name, self.field.shape, self.dtype, matrices, self.conversions)


def is_packed_by(ops: Sequence[Any]) -> bool:
    """Whether a converter's operations begin with a quantizer's own."""
    return bool(ops) and getattr(ops[0], "hf_quantizer", None) is not None


def pack_column(
    moe: MoELayer, f: Field, parameter: str, converter: Any, found: Sequence[Sources], stacked: bool
) -> PackedColumn | None:
    """The column of one parameter of a layer; None where the checkpoint has it unquantised.

    Raises `CheckpointError` naming tensor and file for scales that are missing or do not fit, for experts that are not
    alike, and `UnsupportedModelError` for a format that is not read.
    """
    dequantiser, *ops = converter.operations
    if type(dequantiser).__name__ not in DEQUANTISERS:
        raise UnsupportedModelError(
            f"{parameter}: transformers unpacks it with {dequantiser!r}, which is not known here"
        )
    by_matrix: dict[str, dict[str, Sources]] = {}
    for sources in found:
        matrix, role = role_of(sources.label)
        by_matrix.setdefault(matrix, {})[role] = sources
    matrices: list[tuple[Recognised, tuple[str, ...]]] = []
    plain: list[str] = []
    ranges: dict[str, Sequence[TensorRange]] = {}
    patterns: dict[str, str] = {}
    for matrix, roles in by_matrix.items():
        recognised = _recognise_all(moe, matrix, roles)
        if recognised is None:
            plain.append(matrix)
            continue
        names = tuple(f"{f.name}.{roles[role].label}" for role in READ)
        ranges |= {name: roles[role].ranges for name, role in zip(names, READ, strict=True)}
        patterns |= {name: str(roles[role].pattern) for name, role in zip(names, READ, strict=True)}
        matrices.append((recognised, names))
    if not matrices:
        return None
    if plain:
        packed = next(matrix for matrix in by_matrix if matrix not in plain)
        where = files_of(by_matrix[matrix]["codes"].ranges[0] for matrix in (plain[0], packed))
        raise CheckpointError(
            f"{moe.name}: the checkpoint has {plain[0]} unquantised and {packed} quantised (in {where}); transformers "
            f"makes one parameter of both ({f.name}). Use a checkpoint that has both alike"
        )
    shapes = tuple(recognised.shape for recognised, _ in matrices)
    where = files_of(found[0] for found in ranges.values())
    conversions = _conversions(moe, f, parameter, type(dequantiser).__name__, ops, shapes, where)
    scales = next(roles["scales"].ranges[0].dtype for roles in by_matrix.values())
    dtype = _loaded_dtype(type(dequantiser).__name__, matrices[0][0].format, scales, f.dtype)
    return PackedColumn(f, ranges, dtype, matrices, conversions, MadeBy(parameter, converter, patterns, stacked))


def _loaded_dtype(dequantiser: str, format: Format, scales: torch.dtype, asked: torch.dtype) -> torch.dtype:
    """compressed-tensors unpacks codes of four bits into the dtype of their scales (bfloat16 where these are powers of
    two), and nothing converts them afterwards to what was asked for. (`verify.py` sees what was loaded indeed.)"""
    if dequantiser != "CompressedTensorsDequantize" or isinstance(format, FP8):
        return asked
    return scales if scales.is_floating_point and scales.itemsize > 1 else torch.bfloat16


def _conversions(
    moe: MoELayer,
    f: Field,
    parameter: str,
    dequantiser: str,
    ops: Sequence[Any],
    shapes: tuple[Shape, ...],
    where: str,
) -> tuple[Conversion, ...]:
    first = DEQUANTISERS[dequantiser]
    try:
        if len(shapes) > 1 and first:
            raise ValueError("several matrices, each to be turned")
        turned = tuple(shape[::-1] for shape in shapes) if first else shapes
        return first + one_expert_conversions(ops, turned, f.shape, parameter)
    except ValueError as error:
        shown = ", ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(
            f"{moe.name}: the checkpoint has {f.name} quantised, as {shown} (in {where}), the model expects "
            f"{list(f.shape)} ({error}). Use the checkpoint that belongs to this configuration"
        ) from error


def _recognise_all(moe: MoELayer, matrix: str, roles: Mapping[str, Sources]) -> Recognised | None:
    """The format of a matrix, which must be that of every expert: rows of a layer are all alike."""
    known: dict[tuple[Any, ...], Recognised | None] = {}
    for e in range(moe.num_experts):
        parts = {role: sources.ranges[e] for role, sources in roles.items()}
        kind = tuple((role, part.shape, part.dtype) for role, part in parts.items() if role != "unused")
        if kind not in known:
            keys = {role: sources.keys[e] for role, sources in roles.items()}
            known[kind] = recognise_format(f"{moe.name} expert {e} {matrix}", parts, keys)
            if len(known) > 1:
                role = next(role for role, *said in kind if (role, *said) not in next(iter(known)))
                raise CheckpointError(
                    f"{parts[role].file}: {keys[role]!r} is of another dtype or shape than that of expert 0 "
                    f"({list(parts[role].shape)}, not {list(roles[role].ranges[0].shape)}); the experts of a layer "
                    "are all quantised alike. Download the checkpoint again"
                )
    return next(iter(known.values()))
