"""The files of a safetensors checkpoint, and where each tensor's bytes lie in them.

    model.safetensors.index.json -> shards -> | 8: header size n | n: JSON header | tensor data ... |

The safetensors library opens every shard first: it is the judge of what a valid file is. The header is then read again
here, because the library does not tell offsets, and every number in it is checked before anything relies on it. Nothing
is ever memory-mapped: touching a mapped page of a file that was truncated meanwhile kills the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files.file_stamp import FileStamp

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
#: safetensors' names of the dtypes whose elements are whole bytes, as far as this torch has them.
DTYPES: dict[str, torch.dtype] = {k: getattr(torch, v) for k, v in _DTYPE_NAMES.items() if hasattr(torch, v)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorRange:
    """One tensor, or one expert's slice of a stacked one: `nbytes` contiguous row-major bytes at `offset` of `file`."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, e: int) -> TensorRange:
        """Slice `e` of dimension 0."""
        nbytes = self.nbytes // self.shape[0]
        return TensorRange(self.file, self.offset + e * nbytes, nbytes, self.shape[1:], self.dtype)


class Headers(dict[str, TensorRange]):
    """`{checkpoint key: TensorRange}`, with the stamp each file had when its header was read."""

    stamps: dict[Path, FileStamp]


def index_names(folder: Path) -> list[str]:
    """The file names that the folder's index lists; none where a single model.safetensors makes an index pointless.

    Raises `CheckpointError` when the index is damaged or lists a file outside the folder.
    """
    index = folder / INDEX
    return _names_in(index) if index.is_file() and not (folder / "model.safetensors").is_file() else []


def shard_files(folder: Path, skip: str = "") -> list[Path]:
    """The safetensors files of a checkpoint folder, each once, in name order, but for the one called `skip`.

    Raises `CheckpointError` naming the file when the folder has none, the index is damaged, a shard it lists is missing
    or outside the folder, or a file is a Git-LFS pointer.
    """
    single = folder / "model.safetensors"
    names = [single.name] if single.is_file() else index_names(folder)
    if not names:
        raise CheckpointError(
            f"{folder}: expected model.safetensors or model.safetensors.index.json, found {_what_is_in(folder)}. "
            "Point at the folder of a safetensors checkpoint; .bin files (pickle) are not read: convert them by "
            "loading the model with transformers and calling save_pretrained."
        )
    files = [folder / name for name in names if name != skip]
    for file in files:
        if not file.is_file():
            what = "a link whose target is gone" if file.is_symlink() else "nothing there"
            raise CheckpointError(f"{file}: listed in {INDEX}, found {what}. Download the missing shard.")
        _refuse_pointer(file)
    return files


def read_headers(files: Iterable[Path]) -> Headers:
    """Where every tensor of `files` lies. Reads headers only.

    Raises `CheckpointError` naming the file when one is unreadable, truncated or malformed, has a dtype unknown here,
    or repeats a key of another file.
    """
    headers = Headers()
    headers.stamps = {}
    for file in files:
        _open_with_library(file)
        ranges, stamp = _read_header(file)
        for key, found in ranges.items():
            if key in headers:
                raise CheckpointError(
                    f"{file}: tensor {key!r} is also in {headers[key].file.name}; which one counts cannot be told. "
                    "Remove the shard that does not belong to this checkpoint."
                )
            headers[key] = found
        headers.stamps[file] = stamp
    return headers


def _names_in(index: Path) -> list[str]:
    _refuse_pointer(index)
    try:
        weight_map = json.loads(_read_bounded(index))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: expected JSON with a 'weight_map' of file names, found {type(error).__name__}: {error}. "
            "Download the file again."
        ) from error
    for name in names:
        path = PurePosixPath(name) if isinstance(name, str) else None
        if path is None or not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise CheckpointError(
                f"{index}: lists the file {name!r}, which is not a name inside the checkpoint folder; refused. "
                "Do not use this checkpoint unless you trust where it comes from."
            )
    if not names:
        raise CheckpointError(f"{index}: its weight_map lists no file at all. Download the file again.")
    return names


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
        raise CheckpointError(f"{file}: cannot be read: {error}. Check that it exists and may be read.") from error
    if pointer:
        raise CheckpointError(f"{file}: is a Git-LFS pointer, not the file itself. Run `git lfs pull` in the folder.")


def _what_is_in(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    return f"{', '.join(found[:4])}{' ...' if len(found) > 4 else ''}" if found else "neither"


def _open_with_library(file: Path) -> None:
    try:
        with safe_open(file, framework="pt", backend="pread"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error


def _read_header(file: Path) -> tuple[dict[str, TensorRange], FileStamp]:
    try:
        with file.open("rb") as stream:
            stamp = FileStamp.of(stream.fileno())
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER_BYTES, stamp.size - 8):
                raise ValueError(f"its header claims {length} bytes, the file has {stamp.size}")
            entries = json.loads(stream.read(length), object_pairs_hook=_no_repeats)
        entries.pop("__metadata__", None)
        return {key: _range(file, entry, 8 + length, stamp.size) for key, entry in entries.items()}, stamp
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error


def _range(file: Path, entry: Any, data: int, size: int) -> TensorRange:
    """Check one header entry; `data` is where tensor data begins. Any error raised here names only the entry."""
    begin, end = entry["data_offsets"]
    shape, name = tuple(entry["shape"]), entry["dtype"]
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
        raise ValueError(f"offsets and sizes must be whole numbers: {entry}")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown to moe_offload with torch {torch.__version__}")
    dtype = DTYPES[name]
    if not begin <= end <= size - data or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets do not fit the shape or the file ({size - data} bytes of data): {entry}")
    return TensorRange(file, data + begin, end - begin, shape, dtype)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key appears twice in its header")
    return entries


def _damaged(file: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a usable safetensors file: {found}. Download or save the file again.")
