"""Which safetensors files of a folder are its weights, by transformers' own order of preference.

    config.json's "transformers_weights"   that file, or the shards of that index
    model[.variant].safetensors            that file
    model.safetensors.index[.variant].json the shards that it lists

and, where the configuration's class names extra files, those of them that are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import CheckpointError
from ..folder import INDEX, LFS_POINTER, SINGLE, without_weights
from ..headers import MAX_HEADER_BYTES

#: What save_pretrained(distributed_checkpoint=True) writes.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """`files` in name order; `index` is where they are listed (None: a single file), `metadata` what else it says."""

    files: tuple[Path, ...]
    index: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def weight_files(
    folder: Path, *, variant: str | None = None, named: str | None = None, extra: Sequence[str] = (), skip: str = ""
) -> WeightFiles:
    """The files that hold the weights of `folder`, each once, in name order, but for the one called `skip`.

    `named` is what config.json calls transformers_weights, `extra` are files that are read if they are there.
    Raises `CheckpointError` naming the file when the folder has none, the index is damaged, a shard it lists is missing
    or outside the folder, or a file is a Git-LFS pointer.
    """
    refuse_distributed(folder)
    names, index, metadata = _named(folder, named) if named else _usual(folder, variant)
    if not names:
        wanted = f"{with_variant(SINGLE, variant)} or {with_variant(INDEX, variant)}"
        raise without_weights(folder, wanted)
    files = [folder / name for name in names if name != skip]
    files += [folder / name for name in extra if (folder / name).is_file() and folder / name not in files]
    for file in files:
        if not file.is_file():
            what = "a link whose target is gone" if file.is_symlink() else "nothing there"
            where = f"listed in {index.name}" if index else "what config.json names as transformers_weights"
            raise CheckpointError(f"{file}: {where}, found {what}. Download the missing shard")
        _refuse_pointer(file)
    return WeightFiles(tuple(files), index, metadata)


def listed_names(folder: Path, variant: str | None = None, named: str | None = None) -> list[str]:
    """The file names that the folder's index lists; none where a single file makes an index pointless.

    Raises `CheckpointError` when the index is damaged or lists a file outside the folder.
    """
    names, index, _ = _named(folder, named) if named else _usual(folder, variant)
    return names if index is not None else []


def refuse_distributed(folder: Path) -> None:
    """Raise `CheckpointError` for what transformers would load with torch's distributed checkpoints."""
    found = [file.name for file in folder.iterdir() if DISTRIBUTED.fullmatch(file.name)] if folder.is_dir() else []
    if found:
        raise CheckpointError(
            f"{folder}: holds a distributed checkpoint ({found[0]} ...), which is not read here. Load it with "
            "transformers and save it with save_pretrained() in the ordinary layout"
        )


def _usual(folder: Path, variant: str | None) -> tuple[list[str], Path | None, dict[str, Any]]:
    single, index = folder / with_variant(SINGLE, variant), folder / with_variant(INDEX, variant)
    if single.is_file():
        return [single.name], None, {}
    if not index.is_file():
        return [], None, {}
    names, metadata = _read_index(index)
    return names, index, metadata


def _named(folder: Path, named: str) -> tuple[list[str], Path | None, dict[str, Any]]:
    _refuse_outside(folder / "config.json", "transformers_weights", named)
    if named.endswith(".safetensors"):
        return [named], None, {}
    if not named.endswith(".safetensors.index.json"):
        raise CheckpointError(
            f"{folder / 'config.json'}: its transformers_weights is {named!r}, which is neither *.safetensors nor "
            "*.safetensors.index.json, the only files that are read. Name one of these, or remove the entry"
        )
    names, metadata = _read_index(folder / named)
    return names, folder / named, metadata


def _read_index(index: Path) -> tuple[list[str], dict[str, Any]]:
    _refuse_pointer(index)
    try:
        content = json.loads(_read_bounded(index))
        names, metadata = sorted(set(content["weight_map"].values())), content.get("metadata") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: expected JSON with a 'weight_map' of file names, found {type(error).__name__}: {error}. "
            "Download the file again"
        ) from error
    for name in names:
        _refuse_outside(index, "weight_map", name)
    if not names:
        raise CheckpointError(f"{index}: its weight_map lists no file at all. Download the file again")
    return names, metadata if isinstance(metadata, dict) else {}


def _refuse_outside(source: Path, entry: str, name: Any) -> None:
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise CheckpointError(
            f"{source}: its {entry} lists the file {name!r}, which is not a name inside the checkpoint folder; "
            "refused. Do not use this checkpoint unless you trust where it comes from"
        )


def with_variant(name: str, variant: str | None) -> str:
    """transformers' place for a variant: before the last ending."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _read_bounded(file: Path) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(MAX_HEADER_BYTES + 1)
    if len(data) > MAX_HEADER_BYTES:
        raise ValueError(f"more than {MAX_HEADER_BYTES} bytes")
    return data


def _refuse_pointer(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}. Check that it exists and may be read") from error
    if pointer:
        raise CheckpointError(f"{file}: is a Git-LFS pointer, not the file itself. Run `git lfs pull` in the folder")
