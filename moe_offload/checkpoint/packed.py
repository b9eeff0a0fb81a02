"""Reading a packed checkpoint: its experts are the rows that slots hold, so a miss is one aligned read, unconverted.

    model.safetensors.index.json                 lists the dense shards, and the experts in a file that does not exist:
    model-00001-of-00002.safetensors             plain transformers stops there rather than inventing experts
    moe_offload_rows-00001-of-00009.safetensors  one tensor U8 [E, row_bytes] per MoE layer, data on whole pages
        __metadata__["moe_offload_rows"]         JSON: version, model type, per layer its fields and its recipe
        __metadata__["moe_offload_sources"]      (first file) names, dtypes and shapes of the tensors rows were made of

("Packed" is said of these checkpoints, which `moe-offload pack` writes. The room `packed/` is about quantised
matrices.)

The sources are kept, without their bytes, for two reasons. transformers loads the dense weights by its own rules, which
need to see that the experts are there. And the *recipe* of a layer, a digest of which source goes where in a row and
how it is converted, is worked out again from them at every load: rows are used only if the installed transformers would
make the same ones today.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..experts import Begins, MoELayer
from .folder import ABSENT
from .headers import Headers, TensorRange, read_headers
from .packed_format import VERSION, begins_of, describe_layer, parse_sources
from .pretrained.weight_files import listed_names, weight_files
from .row_index import RowIndex, index_rows, row_at

ROWS = "moe_offload_rows"
SOURCES = "moe_offload_sources"

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def is_packed(folder: Path) -> bool:
    """Whether `folder` was written by `pack_checkpoint`. Raises `CheckpointError` when its index is damaged."""
    return ABSENT in listed_names(folder)


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's headers say, read once.

    `headers` are those of every tensor; of a packed checkpoint they hold the experts' sources, which lie in no file
    (they tell names, shapes and dtypes, and are not to be read), and `rows` are those of the packed rows.
    """

    headers: Headers
    rows: Headers | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_stored(folder: Path, config: Any = None, variant: str | None = None) -> Stored:
    """Read the headers of the files that transformers would load for `config`, and those of packed rows.

    Raises `CheckpointError` naming the file that is missing, damaged or of another version.
    """
    packed = variant is None and is_packed(folder)  # packed rows come in one variant only
    named, extra = getattr(config, "transformers_weights", None), getattr(type(config), "extra_files", ())
    if packed:
        files = weight_files(folder, skip=ABSENT)
    else:
        files = weight_files(folder, variant=variant, named=named, extra=extra)
    headers = read_headers(files.files)
    if not packed:
        return Stored(headers, None, files.metadata)
    first, *others = _rows_files(folder)
    rows = read_headers([first, *others])
    _facts(first, rows)  # of a version whose sources can be read
    try:
        headers.update(parse_sources(_metadata(first, rows, SOURCES)))
    except _MALFORMED as error:
        raise _damaged(first, error) from error
    return Stored(headers, rows, files.metadata)


def index_stored(model: Any, moe_layers: Sequence[MoELayer], stored: Stored) -> RowIndex:
    """`index_rows` of a checkpoint, packed or not.

    Raises what `index_rows` raises, and `CheckpointError` naming the file when packed rows are damaged or incomplete,
    or are not those that the installed transformers would make for this model and dtype.
    """
    ranges = stored.rows
    if ranges is None:
        return index_rows(model, moe_layers, stored.headers)
    files = list(ranges.opened)
    try:
        index = index_rows(model, moe_layers, stored.headers)
    except (CheckpointError, UnsupportedModelError) as error:
        raise _misfit(files[0], f"the experts that were packed are not this model's: {error}") from error
    described: dict[str, tuple[Path, Any]] = {}
    for file in files:
        model_type, layers = _facts(file, ranges)
        if model_type != model.config.model_type:
            raise _misfit(file, f"packed for a {model_type!r}, config.json says {model.config.model_type!r}")
        described |= {name: (file, layer) for name, layer in layers.items()}
    index = dataclasses.replace(
        index, begins=tuple(_begins(moe, described, index.packings[moe.index] is not None) for moe in moe_layers)
    )
    rows = []
    for moe in index.pack(moe_layers):
        if moe.name not in described or moe.name not in ranges:
            raise _misfit(files[0], f"none of the {len(files)} files has the experts of {moe.name}")
        file, found = described[moe.name]
        _check_layer(file, moe, found, describe_layer(moe, index.rows[moe.index]), ranges[moe.name])
        start = ranges[moe.name].offset
        rows.append(tuple(row_at(file, start + e * moe.layout.row_bytes, moe) for e in range(moe.num_experts)))
    return dataclasses.replace(index, rows=tuple(rows), stamps=ranges.stamps)


def _rows_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob(f"{ROWS}-*-of-*.safetensors"))
    counts = {file.stem.rpartition("-")[2] for file in files}
    if len(counts) != 1 or not files[0].stem.endswith(f"-{len(files):05d}"):
        raise CheckpointError(
            f"{folder}: a packed checkpoint has its experts in {ROWS}-00001-of-N.safetensors to N-of-N; found "
            f"{', '.join(file.name for file in files[:4]) or 'none of them'}. Copy the missing files, or pack again"
        )
    return files


def _metadata(file: Path, headers: Headers, key: str) -> str:
    try:
        return str((headers.opened[file].metadata() or {})[key])
    except Exception as error:  # the library's own errors are of several kinds
        raise _damaged(file, error) from error


def _facts(file: Path, headers: Headers) -> tuple[str, dict[str, Any]]:
    """The model type, and `{layer name: its description}`, as the file's metadata has them."""
    try:
        facts = json.loads(_metadata(file, headers, ROWS))
        version, model_type, layers = facts["version"], facts["model_type"], dict(facts["layers"])
    except _MALFORMED as error:
        raise _damaged(file, error) from error
    if version != VERSION:
        raise CheckpointError(
            f"{file}: rows in format version {version!r}; this moe_offload reads version {VERSION}. Use the version of "
            "moe_offload that packed it, or pack the original checkpoint again"
        )
    return model_type, layers


def _begins(moe: MoELayer, described: Mapping[str, tuple[Path, Any]], quantised: bool) -> tuple[Begins, ...] | None:
    """Where the fields of the layer's experts begin; None where it is quantised, or what is said of it is missing or
    wrong, which `_check_layer` tells."""
    if quantised or moe.name not in described:
        return None
    try:
        return begins_of(described[moe.name][1], moe)
    except _MALFORMED:
        return None


def _check_layer(file: Path, moe: MoELayer, found: Any, wanted: dict[str, Any], tensor: TensorRange) -> None:
    """`found` is the file's description of the layer, `wanted` is what it would be if it were packed now."""
    if found != wanted:
        found = found if isinstance(found, dict) else {}
        differs = next(key for key in [*wanted, *found] if wanted.get(key) != found.get(key))
        if differs == "recipe":
            raise _misfit(file, f"{moe.name}: its rows would now be made from the original tensors in another way")
        raise _misfit(file, f"{moe.name}: packed with {differs} {found.get(differs)}, needed is {wanted.get(differs)}")
    shape = (moe.num_experts, moe.layout.row_bytes)
    if (tensor.file, tensor.shape, tensor.dtype) != (file, shape, torch.uint8):
        raise _damaged(file, ValueError(f"{moe.name} is {tensor.dtype} {list(tensor.shape)}, not uint8 {list(shape)}"))


def _misfit(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: its rows are not those of this model under transformers {version('transformers')}: {found}. Pack "
        "the original checkpoint again (moe-offload pack), or ask for the dtype it was packed in"
    )


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: not a usable file of packed rows ({type(error).__name__}: {error}). Copy it again, or pack again"
    )
