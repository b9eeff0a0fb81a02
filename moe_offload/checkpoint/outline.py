"""The outline of a model: every module and shape, where each tensor lies, and nothing of its weights.

folder with shards      config.json, and the headers of the shards, checked as they are for loading
folder without          config.json alone: what is to be downloaded can be planned first
Hub repository          config.json, and the headers of its shards by range requests (a few KB each)

Made once and handed on: planning, loading and packing all work from the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..experts import MoELayer, find_experts
from .folder import is_folder
from .headers import DTYPES, Headers, TensorRange
from .packed import Stored, index_stored, read_stored
from .pretrained.arguments import Arguments
from .pretrained.download import download_checkpoint
from .pretrained.skeleton import build_skeleton, read_configuration
from .pretrained.weight_files import listed_names
from .quantised.blocks import check_blocks
from .quantised.misfits import check_dense
from .row_index import RowIndex

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outline:
    """`model` is on the meta device (or the one that was given); `source` says what its sizes were read from.

    `folder` is where the files lie, `stored` what their headers say and `index` where each expert's row is; None where
    there are no files to read from.
    """

    model: PreTrainedModel
    moe_layers: list[MoELayer]
    source: str
    folder: Path | None = None
    stored: Stored | None = None
    index: RowIndex | None = None

    def pack(self, moe_layers: Sequence[MoELayer]) -> list[MoELayer]:
        """The layers of the same model, with rows as they rest in this checkpoint."""
        return list(moe_layers) if self.index is None else self.index.pack(moe_layers)


def outline_checkpoint(path_or_id: str | Path, arguments: Arguments) -> Outline:
    """Read headers only. Raises `CheckpointError` when they cannot be had or do not fit the model's configuration."""
    folder = Path(path_or_id) if is_folder(path_or_id) else _cached(str(path_or_id), arguments)
    if folder is None:
        return _outline_repository(str(path_or_id), arguments)
    if _has_shards(folder):
        return outline_folder(folder, arguments)
    model = build_skeleton(folder, read_configuration(folder, arguments), None, arguments)
    return Outline(model, find_experts(model), "config.json alone (there are no weights in the folder)")


def outline_folder(folder: Path, arguments: Arguments | None = None) -> Outline:
    """The outline of a folder that holds all files of a checkpoint. Nothing later reads a header again."""
    arguments = arguments or Arguments()
    place = folder / arguments.subfolder
    config = read_configuration(place, arguments)
    return _outline_stored(place, config, read_stored(place, config, arguments.variant), arguments)


def outline_stored(place: Path, stored: Stored) -> Outline:
    """The outline that a folder with this config.json has once its weights lie where `stored` says."""
    return _outline_stored(place, read_configuration(place, Arguments()), stored, Arguments())


def _outline_stored(place: Path, config: Any, stored: Stored, arguments: Arguments) -> Outline:
    model, moe_layers, index = _index_model(place, config, stored, arguments)
    source = f"config.json and the headers of {len(index.stamps)} shards"
    return Outline(model, moe_layers, source, place, stored, index)


def _outline_repository(name: str, arguments: Arguments) -> Outline:
    stored = Stored(hub_headers(name))
    model, moe_layers, _ = _index_model(name, read_configuration(name, arguments), stored, arguments)
    files = {found.file for found in stored.headers.values()}
    return Outline(model, moe_layers, f"config.json and the headers of {len(files)} shards on the Hub")


def _index_model(
    place: Path | str, config: Any, stored: Stored, arguments: Arguments
) -> tuple[PreTrainedModel, list[MoELayer], RowIndex]:
    """The model of `config` on the meta device, its MoE layers as they rest in the files, and where their rows are."""
    model = build_skeleton(place, config, stored, arguments)
    moe_layers = find_experts(model)
    index = index_stored(model, moe_layers, stored)
    check_dense(model, stored.headers, index.keys)
    check_blocks(model.config, stored.headers, index.keys)
    return model, index.pack(moe_layers), index


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
    for file, metadata in found.files_metadata.items():
        for key, tensor in metadata.tensors.items():
            if tensor.dtype in DTYPES:
                headers[key] = _range(name, file, key, tensor)
            else:
                headers.unreadable[key] = tensor.dtype, Path(file)
    return headers


def _range(name: str, file: str, key: str, tensor: Any) -> TensorRange:
    (begin, end), dtype = tensor.data_offsets, DTYPES[tensor.dtype]
    if end - begin != math.prod(tensor.shape) * dtype.itemsize:
        raise CheckpointError(
            f"{name}: {file} has {key!r} as {tensor.dtype} {list(tensor.shape)} in {end - begin} bytes, which "
            "cannot be read here; the checkpoint is damaged"
        )
    return TensorRange(Path(file), begin, end - begin, tuple(tensor.shape), dtype)


def _cached(name: str, arguments: Arguments) -> Path | None:
    """The folder of a repository that was downloaded before, weights and all."""
    try:
        folder = download_checkpoint(name, arguments, local_files_only=True)
    except CheckpointError:
        return None
    return folder if _has_shards(folder) and all((folder / file).exists() for file in listed_names(folder)) else None


def _has_shards(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
