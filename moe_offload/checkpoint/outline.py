"""The outline of a model: every module and shape, and nothing of its weights, from a folder or from the Hub.

folder with shards      config.json, and the headers of the shards, checked as they are for loading
folder without          config.json alone: what is to be downloaded can be planned first
Hub repository          config.json, and the headers of its shards by range requests (a few KB each)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..experts import MoELayer, find_experts
from .folder import is_folder
from .headers import DTYPES, Headers, TensorRange, index_names
from .loading import HUB_FILES, skeleton
from .packed import index_checkpoint
from .row_index import index_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outline:
    """`model` is on the meta device; `source` says what its sizes were read from."""

    model: PreTrainedModel
    moe_layers: list[MoELayer]
    source: str


def outline(path_or_id: str | Path, dtype: str | torch.dtype = "auto") -> Outline:
    """Read headers only. Raises `CheckpointError` when they cannot be had or do not fit the model's configuration."""
    if is_folder(path_or_id):
        return _of_folder(Path(path_or_id), dtype)
    name = str(path_or_id)
    cached = _cached(name)
    if cached is not None:
        return _of_folder(cached, dtype)
    headers = hub_headers(name)
    model = skeleton(name, dtype, stored=headers)
    moe_layers = find_experts(model)
    index_rows(model, moe_layers, headers)
    files = {found.file for found in headers.values()}
    return Outline(model, moe_layers, f"config.json and the headers of {len(files)} shards on the Hub")


def _of_folder(folder: Path, dtype: str | torch.dtype) -> Outline:
    if not _has_shards(folder):
        model = skeleton(folder, dtype, stored=Headers())
        return Outline(model, find_experts(model), "config.json alone (there are no weights in the folder)")
    model = skeleton(folder, dtype)
    moe_layers = find_experts(model)
    index = index_checkpoint(model, moe_layers, folder)
    return Outline(model, moe_layers, f"config.json and the headers of {len(index.stamps)} shards")


def hub_headers(name: str) -> Headers:
    """Where every tensor of a Hub repository's shards lies. Raises `CheckpointError`, saying what to try."""
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(name)
    except Exception as error:  # its HTTP library has errors of its own, which are neither OSError nor ValueError
        raise CheckpointError(
            f"{name}: no folder here, and its headers cannot be had from the Hub: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}. Check the name and the connection (HF_HUB_OFFLINE, "
            "HF_TOKEN), or give the path of a folder with its config.json"
        ) from error
    headers = Headers()
    headers.stamps = {}
    for file, metadata in found.files_metadata.items():
        for key, tensor in metadata.tensors.items():
            headers[key] = _range(name, file, key, tensor)
    return headers


def _range(name: str, file: str, key: str, tensor: Any) -> TensorRange:
    begin, end = tensor.data_offsets
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or end - begin != math.prod(tensor.shape) * dtype.itemsize:
        raise CheckpointError(
            f"{name}: {file} has {key!r} as {tensor.dtype} {list(tensor.shape)} in {end - begin} bytes, which "
            "cannot be read here; the checkpoint is damaged, or of a dtype this torch lacks"
        )
    return TensorRange(Path(file), begin, end - begin, tuple(tensor.shape), dtype)


def _cached(name: str) -> Path | None:
    """The folder of a repository that was downloaded before, weights and all."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
    except (OSError, ValueError):
        return None
    listed = index_names(folder)
    return folder if _has_shards(folder) and all((folder / file).exists() for file in listed) else None


def _has_shards(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
