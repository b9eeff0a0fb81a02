"""A packed checkpoint: the experts as the rows that slots hold, so that a miss is one aligned read and no conversion.

    model.safetensors.index.json                 lists the dense shards, and the experts in a file that does not exist:
    model-00001-of-00002.safetensors             plain transformers stops there rather than inventing experts
    moe_offload_rows-00001-of-00009.safetensors  one tensor U8 [E, row_bytes] per MoE layer, data on whole pages
        __metadata__["moe_offload_rows"]         JSON: version, model type, per layer its fields and its recipe
        __metadata__["moe_offload_sources"]      (first file) names, dtypes and shapes of the tensors rows were made of

The sources are kept, without their bytes, for two reasons. transformers loads the dense weights by its own rules, which
need to see that the experts are there. And the *recipe* of a layer, a digest of which source goes where in a row and
how it is converted, is worked out again from them at every load: rows are used only if the installed transformers would
make the same ones today.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import CheckpointError, UnsupportedModelError
from ..experts import MoELayer
from .headers import Headers, TensorRange, index_names, read_headers, shard_files
from .packed_format import VERSION, describe, parse_sources
from .row_index import RowIndex, index_rows, row_at

ROWS = "moe_offload_rows"
SOURCES = "moe_offload_sources"
#: Where the index says the experts are. No such file is ever written; its name is what people read when they look.
ABSENT = "experts-are-packed-see-PACKED.md.safetensors"

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def is_packed(folder: Path) -> bool:
    """Whether `folder` was written by `pack_checkpoint`. Raises `CheckpointError` when its index is damaged."""
    return ABSENT in index_names(folder)


def checkpoint_headers(folder: Path) -> Headers:
    """Every tensor of a checkpoint, packed or not: `read_headers`, with the experts' sources of a packed one.

    The sources' ranges lie in no file: they tell names, shapes and dtypes, and are not to be read.
    """
    headers = read_headers(shard_files(folder, skip=ABSENT))
    if is_packed(folder):
        first, *_ = _rows_files(folder)
        _facts(first)  # of a version whose sources can be read
        try:
            headers.update(parse_sources(_metadata(first, SOURCES)))
        except _MALFORMED as error:
            raise _damaged(first, error) from error
    return headers


def index_checkpoint(model: Any, moe_layers: Sequence[MoELayer], folder: Path) -> RowIndex:
    """`index_rows` of a checkpoint folder, packed or not.

    Raises what `index_rows` raises, and `CheckpointError` naming the file when packed rows are damaged or incomplete,
    or are not those that the installed transformers would make for this model and dtype.
    """
    headers = checkpoint_headers(folder)
    if not is_packed(folder):
        return index_rows(model, moe_layers, headers)
    files = _rows_files(folder)
    ranges = read_headers(files)
    try:
        index = index_rows(model, moe_layers, headers)
    except (CheckpointError, UnsupportedModelError) as error:
        raise _misfit(files[0], f"the experts that were packed are not this model's: {error}") from error
    described: dict[str, tuple[Path, Any]] = {}
    for file in files:
        model_type, layers = _facts(file)
        if model_type != model.config.model_type:
            raise _misfit(file, f"packed for a {model_type!r}, config.json says {model.config.model_type!r}")
        described |= {name: (file, layer) for name, layer in layers.items()}
    rows = []
    for moe in moe_layers:
        if moe.name not in described or moe.name not in ranges:
            raise _misfit(files[0], f"none of the {len(files)} files has the experts of {moe.name}")
        file, found = described[moe.name]
        _check_layer(file, moe, found, describe(moe, index.rows[moe.index]), ranges[moe.name])
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


def _metadata(file: Path, key: str) -> str:
    try:
        with safe_open(file, framework="pt", backend="pread") as opened:
            return str((opened.metadata() or {})[key])
    except Exception as error:  # the library's own errors are of several kinds
        raise _damaged(file, error) from error


def _facts(file: Path) -> tuple[str, dict[str, Any]]:
    """The model type, and `{layer name: its description}`, as the file's metadata has them."""
    try:
        facts = json.loads(_metadata(file, ROWS))
        version, model_type, layers = facts["version"], facts["model_type"], dict(facts["layers"])
    except _MALFORMED as error:
        raise _damaged(file, error) from error
    if version != VERSION:
        raise CheckpointError(
            f"{file}: rows in format version {version!r}; this moe_offload reads version {VERSION}. Use the version of "
            "moe_offload that packed it, or pack the original checkpoint again"
        )
    return model_type, layers


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
