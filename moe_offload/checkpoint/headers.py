"""The files of a safetensors checkpoint, and where each tensor's bytes lie in them.

    shard (`pretrained/weight_files.py` says which)  =  | 8: header size n | n: JSON header | tensor data ... |

The safetensors library opens every shard first: it is the judge of what a valid file is. The header is then read again
here, because the library does not tell offsets, and every number in it is checked before anything relies on it. Nothing
is ever memory-mapped: touching a mapped page of a file that was truncated meanwhile kills the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..experts import FIELD_ALIGN
from ..files.file_stamp import FileStamp

#: In the metadata of a file that was copied: how many bytes past a cache line tensors began in the original, JSON.
BEGINS = "moe_offload_begins"
MAX_HEADER_BYTES = 100_000_000  # the library's own limit

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
    """One tensor, or one expert's slice of a stacked one: `nbytes` contiguous row-major bytes at `offset` of `file`.

    Of a file that was copied, `moved` is by how much its place differs from that in the original one, modulo a cache
    line."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    moved: int = 0

    @property
    def begin(self) -> int:
        """How many bytes past a cache line plain transformers has it, which maps the (original) file."""
        begin = (self.offset + self.moved) % FIELD_ALIGN
        return begin if begin % self.dtype.itemsize == 0 else 0

    def __getitem__(self, e: int) -> TensorRange:
        """Slice `e` of dimension 0."""
        nbytes = self.nbytes // self.shape[0]
        return TensorRange(self.file, self.offset + e * nbytes, nbytes, self.shape[1:], self.dtype, self.moved)


class Headers(dict[str, TensorRange]):
    """`{checkpoint key: TensorRange}`, and of each file the stamp it had when its header was read.

    `opened` are the library's own handles of the files, through which a few dense weights are read; none is yet.
    `unreadable` are keys whose dtype this torch lacks, with its name and file: an error only if one of them is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stamps: dict[Path, FileStamp] = {}
        self.opened: dict[Path, Any] = {}
        self.unreadable: dict[str, tuple[str, Path]] = {}


def read_headers(files: Iterable[Path]) -> Headers:
    """Where every tensor of `files` lies. Reads headers only.

    Raises `CheckpointError` naming the file when one is unreadable, truncated or malformed, or repeats a key of another
    file.
    """
    headers = Headers()
    for file in files:
        headers.opened[file] = _open_with_library(file)
        ranges, unreadable, headers.stamps[file] = _read_header(file)
        headers.unreadable |= {key: (dtype, file) for key, dtype in unreadable.items()}
        for key, found in ranges.items():
            if key in headers:
                raise CheckpointError(
                    f"{file}: tensor {key!r} is also in {headers[key].file.name}; which one counts cannot be told. "
                    "Remove the shard that does not belong to this checkpoint"
                )
            headers[key] = found
    return headers


def files_of(ranges: Iterable[TensorRange]) -> str:
    """The files in which tensors lie, for messages."""
    files = list(dict.fromkeys(str(found.file) for found in ranges))
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _open_with_library(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error


def _read_header(file: Path) -> tuple[dict[str, TensorRange], dict[str, str], FileStamp]:
    """The ranges of a file's tensors; of those whose dtype torch lacks, its name; and the file's stamp."""
    try:
        with file.open("rb") as stream:
            stamp = FileStamp.of(stream.fileno())
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER_BYTES, stamp.size - 8):
                raise ValueError(f"its header claims {length} bytes, the file has {stamp.size}")
            entries = json.loads(stream.read(length), object_pairs_hook=_no_repeats)
        begins = json.loads((entries.pop("__metadata__", None) or {}).get(BEGINS, "{}"))
        if any(type(begin) is not int or not 0 <= begin < FIELD_ALIGN for begin in begins.values()):
            raise ValueError(f"{BEGINS} are not places in a line of {FIELD_ALIGN} bytes: {begins}")
        unreadable = {key: entry["dtype"] for key, entry in entries.items() if entry["dtype"] not in DTYPES}
        ranges = {
            key: _range(file, entry, 8 + length, stamp.size) for key, entry in entries.items() if key not in unreadable
        }
        for key, begin in begins.items():
            ranges[key] = replace(ranges[key], moved=(begin - ranges[key].offset) % FIELD_ALIGN)
        return ranges, unreadable, stamp
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error


def _range(file: Path, entry: Any, data: int, size: int) -> TensorRange:
    """Check one header entry; `data` is where tensor data begins. Any error raised here names only the entry."""
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
        raise ValueError(f"offsets and sizes must be whole numbers: {entry}")
    if not begin <= end <= size - data or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets do not fit the shape or the file ({size - data} bytes of data): {entry}")
    return TensorRange(file, data + begin, end - begin, shape, dtype)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key appears twice in its header")
    return entries


def _damaged(file: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a usable safetensors file: {found}. Download or save the file again")
