"""Which bytes of which files make up each expert's row.

transformers knows how a checkpoint's names and shapes relate to the model's (`get_model_conversion_mapping`). It is
asked here, key by key, exactly as its own loader asks; nothing is decided by a model's name. For one expert:

    field gate_up_proj  <-  [gate_proj of expert 17: file, offset, size; up_proj of ...], conversions (Join(0),)
    field down_proj     <-  [down_proj of expert 17: ...], conversions ()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..experts import FIELD_ALIGN, Begins, Field, MoELayer, RowLayout
from ..files.file_stamp import FileStamp
from .conversion import Conversion, Shape, joins_bytes, keeps_memory, one_expert_conversions
from .expert_keys import label_of, one_key_per_expert, slice_stack
from .headers import Headers, TensorRange, files_of
from .origins import Origin, find_origins, origin_of, own_key
from .pretrained.own_class import is_own
from .quantised.columns import PackedColumn, Packing, Sources, is_packed_by, pack_column
from .quantised.misfits import refuse_codes
from .quantised.recognise import role_of


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

    `names` are the layers' module names, for messages; `stamps` say which files the index was made from; `packings`
    tell of each layer that is quantised how its rows rest, `begins` of each that is not where its experts' fields begin
    in plain transformers. `first[layer]` is the number that the checkpoint gives to expert 0, where the index has one
    process's share only.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[RowSource, ...], ...]
    keys: frozenset[str]
    stamps: Mapping[Path, FileStamp]
    packings: tuple[Packing | None, ...] = ()
    first: tuple[int, ...] = ()
    begins: tuple[tuple[Begins, ...] | None, ...] = ()

    def share_of(self, moe_layers: Sequence[MoELayer]) -> RowIndex:
        """The index of those experts alone that this process has, numbered from 0."""
        first = tuple(moe.first_expert for moe in moe_layers)
        spans = [slice(begin, begin + moe.num_experts) for begin, moe in zip(first, moe_layers, strict=True)]
        rows = tuple(layer[span] for layer, span in zip(self.rows, spans, strict=True))
        begins = tuple(layer and layer[span] for layer, span in zip(self.begins, spans, strict=bool(self.begins)))
        return replace(self, rows=rows, first=first, begins=begins)

    def pack(self, moe_layers: Sequence[MoELayer]) -> list[MoELayer]:
        """The layers, with rows as they rest in this checkpoint."""
        nothing = (None,) * len(moe_layers)
        layers = []
        for moe, found, begins_E in zip(moe_layers, self.packings or nothing, self.begins or nothing, strict=True):
            if found is not None:
                moe = replace(moe, layout=found.layout, packed=found.weights)
            elif begins_E is not None:
                moe = moe.beginning(begins_E)
            layers.append(moe)
        return layers


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
    wanted = {f"{name}.{place.key}" for moe in moe_layers for name in moe.names for place in moe.own_places}
    origins = find_origins(model, headers, wanted)
    layers = []
    for moe in moe_layers:
        columns = [_column_of(model, moe, f, origins, headers) for f in moe.unpacked.fields]
        layers.append(_lay_out(moe, columns, mapped=not is_own(model)))
    keys = frozenset(key for origin in origins.values() for part in origin.parts.values() for key in part)
    names = tuple(moe.name for moe in moe_layers)
    rows, packings, begins = zip(*layers, strict=True) if layers else ((), (), ())
    return RowIndex(names, rows, keys, headers.stamps, packings, begins=begins)


def _lay_out(
    moe: MoELayer, columns: Sequence[Column | PackedColumn], mapped: bool
) -> tuple[tuple[RowSource, ...], Packing | None, tuple[Begins, ...] | None]:
    """The rows of a layer, how they are packed if any of its fields is, and else where its experts' fields begin: in
    the file, if plain transformers may have them `mapped`."""
    packed = [column for column in columns if isinstance(column, PackedColumn)]
    begins_E: tuple[Begins, ...] | None = None
    if packed:
        layout = RowLayout.in_order(part for column in columns for part in column.parts)
    else:
        found = [column.begins(mapped) for column in columns if isinstance(column, Column)]
        begins_E = tuple(tuple(begins) for begins in zip_longest(*found, fillvalue=0))
        layout = moe.beginning(begins_E).unpacked
    fields = {field.name: field for field in layout.fields}
    pieces: list[list[Piece]] = []
    for column in columns:
        if isinstance(column, PackedColumn):
            for name, ranges in column.ranges.items():
                pieces.append([Piece(fields[name], (found,), ()) for found in ranges])
        else:
            pieces.append([Piece(fields[column.field.name], *expert) for expert in column.experts])
    # A stack may be shorter than another: what is beyond it has no share there.
    rows = tuple(tuple(piece for piece in row if piece is not None) for row in zip_longest(*pieces))
    if not packed:
        return rows, None, begins_E
    weights = tuple(column.weight(fields) for column in packed)
    return rows, Packing(layout, weights, {column.field.name: column.made_by for column in packed}), None


@dataclass(frozen=True)
class Column:
    """A field that is not quantised: for each expert, its source tensors and the conversions that make the field.

    The model has it `stacked`, or one parameter an expert, `in_place` where transformers leaves a tensor as it is."""

    field: Field
    experts: Sequence[tuple[tuple[TensorRange, ...], tuple[Conversion, ...]]]
    stacked: bool
    in_place: bool

    @property
    def parts(self) -> list[tuple[str, Shape, torch.dtype]]:
        return [(self.field.name, self.field.shape, self.field.dtype)]

    def begins(self, mapped: bool) -> list[int]:
        """How many bytes past a cache line plain transformers has each expert's: as the file does, which it maps; but
        what it makes anew is in memory of its own, which begins at a line."""
        f = self.field
        if not f.is_placed:
            return [0] * len(self.experts)
        if mapped and self.in_place and all(sources[0].dtype == f.dtype for sources, _ in self.experts):
            return [sources[0].begin for sources, _ in self.experts]
        return [e * f.nbytes % FIELD_ALIGN if self.stacked else 0 for e in range(len(self.experts))]


def _column_of(
    model: Any, moe: MoELayer, f: Field, origins: dict[str, Origin], headers: Headers
) -> Column | PackedColumn:
    """Field `f` of every expert: of the stack in which the model has it, or of one parameter each."""
    places = [place for place in moe.own_places if place.field == f.name]
    found = [origin_of(model, moe, place, origins, headers) for place in places]
    if places[0].expert is None:
        joined = tuple(places[0].tensor.shape[1:]) != f.shape
        return _column(model, replace(moe, num_experts=places[0].count(f.shape)), f, *found[0], headers, joined)
    keys = [own_key(parameter, origin) for parameter, origin in found]
    ranges = [headers[key] for key in keys]
    refuse_codes(model.config, headers, f.name, ranges, keys)
    return _plain_column(moe, f, f"{moe.name}.{f.name}", [], [Sources(None, f.name, keys, ranges)])


def _column(
    model: Any, moe: MoELayer, f: Field, parameter: str, origin: Origin, headers: Headers, joined: bool
) -> Column | PackedColumn:
    """Field `f` of every expert of the layer. `joined`: the model has their shares one below the other, in a matrix."""
    from transformers.core_model_loading import ErnieFuseAndSplitTextVisionExperts, MergeModulelist

    ops = [] if origin.converter is None else origin.converter.operations
    splits = [op for op in ops if type(op) is ErnieFuseAndSplitTextVisionExperts]
    each_has_its_own = splits or any(type(op) is MergeModulelist for op in ops)
    shares = len(origin.converter.target_patterns) if splits else 1
    found = []
    for pattern in [None] if origin.converter is None else origin.converter.source_patterns:
        keys, label = origin.parts.get(pattern, []), f.name if pattern is None else label_of(pattern)
        if not keys and is_packed_by(ops):  # some tensors a format may leave out; `pack_column` checks the others
            continue
        if each_has_its_own:
            keys = one_key_per_expert(moe, label, keys, shares, origin.share, headers)
            found.append(Sources(pattern, label, keys, [headers[key] for key in keys]))
        else:
            ranges = slice_stack(moe, label, keys, headers, f.shape[0] if joined else None)
            found.append(Sources(pattern, label, keys * moe.num_experts, ranges))
    if is_packed_by(ops):
        packed = pack_column(moe, f, parameter, origin.converter, found, stacked=not each_has_its_own)
        if packed is not None:
            return packed
        found, ops = [sources for sources in found if role_of(sources.label)[1] == "codes"], ops[1:]
    for sources in found:
        refuse_codes(model.config, headers, f.name, sources.ranges, sources.keys)
    return _plain_column(moe, f, parameter, ops, found)


def _plain_column(moe: MoELayer, f: Field, parameter: str, ops: Sequence[Any], found: Sequence[Sources]) -> Column:
    conversions: dict[tuple[Shape, ...], tuple[Conversion, ...]] = {}
    experts = []
    for e, sources in enumerate(zip(*(part.ranges for part in found), strict=True)):
        shapes = tuple(source.shape for source in sources)
        if shapes not in conversions:
            try:
                conversions[shapes] = one_expert_conversions(ops, shapes, f.shape, parameter)
            except ValueError as error:
                shown = ", ".join(str(list(shape)) for shape in shapes)
                raise CheckpointError(
                    f"{moe.name}: expert {e} has {f.name} in the checkpoint as {shown} (in {files_of(sources)}), the "
                    f"model expects {list(f.shape)} ({error}). Use the checkpoint that belongs to this configuration"
                ) from error
        experts.append((sources, conversions[shapes]))
    in_place = len(found) == 1 and all(keeps_memory(ops, chain) for chain in conversions.values())
    return Column(f, experts, moe.own_places[0].expert is None, in_place)
