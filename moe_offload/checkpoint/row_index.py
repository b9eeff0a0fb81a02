"""Which bytes of which files make up each expert's row.

transformers knows how a checkpoint's names and shapes relate to the model's (`get_model_conversion_mapping`). It is
asked here, key by key, exactly as its own loader asks; nothing is decided by a model's name. For one expert:

    field gate_up_proj  <-  [gate_proj of expert 17: file, offset, size; up_proj of ...], conversions (Join(0),)
    field down_proj     <-  [down_proj of expert 17: ...], conversions ()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, UnsupportedModelError
from ..experts import Field, MoELayer
from ..files.file_stamp import FileStamp
from .conversion import Conversion, Shape, joins_bytes, one_expert_conversions
from .headers import Headers, TensorRange


@dataclass(frozen=True)
class Piece:
    """One field of one expert: the ranges to read, in order, and the conversions that turn them into the field."""

    field: Field
    sources: tuple[TensorRange, ...]
    conversions: tuple[Conversion, ...]

    @property
    def direct(self) -> bool:
        """Whether the field's bytes are the sources' bytes one after the other: they can be read into the row."""
        return joins_bytes(self.conversions) and all(source.dtype == self.field.dtype for source in self.sources)


#: All fields of one expert, in the layout's order.
RowSource = tuple[Piece, ...]


@dataclass(frozen=True)
class RowIndex:
    """`rows[layer][expert]`, layers numbered like the MoE layers; `keys` are all checkpoint keys of experts.

    `names` are the layers' module names, for messages; `stamps` say which files the index was made from.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[RowSource, ...], ...]
    keys: frozenset[str]
    stamps: Mapping[Path, FileStamp]


def row_at(file: Path, start: int, moe: MoELayer) -> RowSource:
    """An expert whose row lies in `file` from `start` on, as a slot holds it."""
    return tuple(
        Piece(f, (TensorRange(file, start + f.offset, f.nbytes, f.shape, f.dtype),), ()) for f in moe.layout.fields
    )


def index_rows(model: nn.Module, moe_layers: Sequence[MoELayer], headers: Headers) -> RowIndex:
    """Find every expert of `moe_layers` in the files behind `headers`. `model` may be on meta; nothing is read.

    Raises `CheckpointError` naming module and experts when tensors are missing, too many or of another shape, and
    `UnsupportedModelError` when transformers converts them in a way that has no one-expert form.
    """
    wanted = {f"{name}.{f.name}" for moe in moe_layers for name in moe.names for f in moe.layout.fields}
    origins = _find_origins(model, headers, wanted)
    layers = []
    for moe in moe_layers:
        columns = []
        for f in moe.layout.fields:
            parameter, origin = _origin_of(moe, f, origins, headers)
            columns.append(_pieces(moe, f, parameter, origin, headers))
        layers.append(tuple(zip(*columns, strict=True)))
    keys = frozenset(key for origin in origins.values() for part in origin.parts.values() for key in part)
    return RowIndex(tuple(moe.name for moe in moe_layers), tuple(layers), keys, headers.stamps)


@dataclass
class _Origin:
    """Where one stacked parameter comes from: `{source pattern: its keys, in loading order}` and their converter."""

    converter: Any = None  # a WeightConverter, or None: the one key is the parameter itself
    share: int = 0  # which of the converter's targets the parameter is
    parts: dict[str | None, list[str]] = field(default_factory=dict)


def _find_origins(model: nn.Module, headers: Headers, wanted: set[str]) -> dict[str, _Origin]:
    """Group checkpoint keys by the wanted parameter they load into: transformers' own loop, without its tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # late, as in conversion.py
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, names = getattr(model, "base_model_prefix", ""), model.state_dict()
    origins: dict[str, _Origin] = {}
    for key in sorted([*headers, *headers.unreadable], key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:  # named as in the model already: not to be renamed after all
            target, pattern = rename_source_key(key, [], [], prefix, names)
        if target not in names:
            continue
        if key in headers.unreadable:
            dtype, file = headers.unreadable[key]
            raise UnsupportedModelError(
                f"{file}: {key!r}, which the model needs, is of dtype {dtype}, which torch {torch.__version__} does "
                "not have. Use a checkpoint in another dtype, or a later torch"
            )
        converter = None if pattern is None else by_pattern[pattern]
        for share, parameter in enumerate(_targets(target, converter)):
            if parameter in wanted:
                origin = origins.setdefault(parameter, _Origin(converter, share))
                if origin.converter is not converter:
                    other = next(iter(origin.parts.values()))[0]
                    raise CheckpointError(
                        f"{parameter}: the checkpoint has it in two forms, {other!r} and {key!r}; which one counts "
                        "cannot be told. Remove the shard that does not belong"
                    )
                origin.parts.setdefault(pattern, []).append(key)
    return origins


def _targets(target: str, converter: Any) -> Iterator[str]:
    """The parameters a key contributes to; renaming gives only the first of them."""
    patterns = [""] if converter is None else converter.target_patterns
    for pattern in patterns:
        yield target if pattern == patterns[0] else target.replace(patterns[0], pattern, 1)


def _origin_of(moe: MoELayer, f: Field, origins: dict[str, _Origin], headers: Headers) -> tuple[str, _Origin]:
    """Parameters tied between modules are stored under one of their names, not always the first."""
    for name in moe.names:
        if f"{name}.{f.name}" in origins:
            return f"{name}.{f.name}", origins[f"{name}.{f.name}"]
    near = [key for key in headers if key.startswith(f"{moe.name.rpartition('.')[0]}.")][:3]
    raise CheckpointError(
        f"{moe.name}: none of its {moe.num_experts} experts has {f.name} in the checkpoint; near that name it has "
        f"{near or 'nothing'}. Use the checkpoint that belongs to this configuration; quantised experts are not read"
    )


def _pieces(moe: MoELayer, f: Field, parameter: str, origin: _Origin, headers: Headers) -> list[Piece]:
    """Field `f` of every expert of the layer."""
    from transformers.core_model_loading import ErnieFuseAndSplitTextVisionExperts, MergeModulelist

    ops = [] if origin.converter is None else origin.converter.operations
    patterns = [None] if origin.converter is None else origin.converter.source_patterns
    splits = [type(op) is ErnieFuseAndSplitTextVisionExperts for op in ops]
    columns = []
    for pattern in patterns:
        keys = origin.parts.get(pattern, [])
        label = f.name if pattern is None else _label(pattern)
        if any(splits) or any(type(op) is MergeModulelist for op in ops):
            shares = len(origin.converter.target_patterns) if any(splits) else 1
            column = [headers[key] for key in _one_key_per_expert(moe, label, keys, shares, origin.share)]
        else:
            column = _slices(moe, label, keys, headers)
        columns.append(column)
    conversions: dict[tuple[Shape, ...], tuple[Conversion, ...]] = {}
    pieces = []
    for e, sources in enumerate(zip(*columns, strict=True)):
        shapes = tuple(source.shape for source in sources)
        if shapes not in conversions:
            try:
                conversions[shapes] = one_expert_conversions(ops, shapes, f.shape, parameter)
            except ValueError as error:
                found = ", ".join(str(list(shape)) for shape in shapes)
                raise CheckpointError(
                    f"{moe.name}: expert {e} has {f.name} in the checkpoint as {found}, the model expects "
                    f"{list(f.shape)} ({error}). Use the checkpoint that belongs to this configuration"
                ) from error
        pieces.append(Piece(f, sources, conversions[shapes]))
    return pieces


def _one_key_per_expert(moe: MoELayer, label: str, keys: list[str], shares: int, share: int) -> list[str]:
    """The keys of this layer's experts, in order of their number, where the checkpoint has one tensor per expert.

    With several `shares`, the list is cut into that many equal runs, one per layer. The loader goes by position in the
    list, so a hole in the numbering would silently give every later expert its neighbour's weights.
    """
    numbers = _numbers(keys)
    first = share * -(-len(keys) // shares)
    absent = sorted(set(range(first, first + moe.num_experts)) - set(numbers))
    if absent:
        which = f"expert {absent[0]} has" if len(absent) == 1 else f"experts {_some(absent)} have"
        raise CheckpointError(
            f"{moe.name}: {which} no {label} in the checkpoint, which has {len(keys)} of them for "
            f"{shares * moe.num_experts} experts. Download the missing shard, or use the right configuration"
        )
    if len(keys) > shares * moe.num_experts or len(set(numbers)) != len(numbers):
        raise CheckpointError(
            f"{moe.name}: the checkpoint has {label} of {len(keys)} experts, the model has "
            f"{shares * moe.num_experts}. Use the checkpoint that belongs to this configuration"
        )
    by_number = dict(zip(numbers, keys, strict=True))
    return [by_number[number] for number in range(first, first + moe.num_experts)]


def _slices(moe: MoELayer, label: str, keys: list[str], headers: Headers) -> list[TensorRange]:
    """One slice per expert of the one tensor in which the checkpoint stacks them."""
    found = {key: list(headers[key].shape) for key in keys}
    if len(found) != 1 or found[keys[0]][:1] != [moe.num_experts]:
        raise CheckpointError(
            f"{moe.name}: expected one tensor {label} of {moe.num_experts} experts, the checkpoint has "
            f"{found or 'none'}. Use the checkpoint that belongs to this configuration"
        )
    return [headers[keys[0]][e] for e in range(moe.num_experts)]


def _numbers(keys: list[str]) -> list[int]:
    """The experts' numbers: the one part in which the keys of a list differ (of a single key, its last number)."""
    split = [key.split(".") for key in keys]
    if not split:
        return []
    varying = [column for column in zip(*split, strict=False) if len(set(column)) > 1]
    numeric = [column for column in zip(*split, strict=False) if all(part.isdecimal() for part in column)]
    column = varying[0] if len(varying) == 1 else numeric[-1] if not varying and numeric else ()
    if len(column) != len(keys) or not all(part.isdecimal() for part in column):
        raise CheckpointError(
            f"expected tensor names that differ only in an expert's number, found {keys[:3]}; cannot tell them apart. "
            "Use the checkpoint that belongs to this configuration"
        )
    return [int(part) for part in column]


def _label(pattern: str) -> str:
    """What a source pattern calls the tensor: 'up_proj' of 'mlp.experts.*.up_proj.weight'."""
    return pattern.replace("\\", "").rpartition("*.")[2].removesuffix(".weight")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
