"""Safetensors files as we write them: which tensors go into which file, and the header before their bytes.

    | 8: header size n | n: JSON header, padded with spaces | tensor data, from a multiple of 4096 on ... |

The format allows the spaces (the library itself pads to 8). With them a tensor of whole pages lies on whole pages,
which is what O_DIRECT asks for.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import torch

from ..experts import ROW_ALIGN, round_up
from ..files.system import forget_cached
from .headers import DTYPE_NAMES, Headers, TensorRange

COPIED_BYTES = 1 << 20  # of a tensor, in memory at a time


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written: `nbytes` bytes of `dtype` and `shape`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, key: str, range_: TensorRange) -> Entry:
        return cls(key, range_.dtype, range_.shape, range_.nbytes)


@dataclass(frozen=True)
class Shard:
    """One file: `header` and then the bytes of `entries`, in order and without gaps."""

    name: str
    entries: tuple[Entry, ...]
    header: bytes

    @classmethod
    def of(cls, name: str, run: Iterable[Entry]) -> Shard:
        """With the largest elements first: so each tensor is aligned, whatever comes before it."""
        entries = tuple(sorted(run, key=lambda entry: -entry.dtype.itemsize))
        return cls(name, entries, make_header(entries, {"format": "pt"}))

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


def split_entries(entries: Sequence[Entry], limit_bytes: int) -> list[tuple[Entry, ...]]:
    """Cut a list into runs of at most `limit_bytes`; a tensor that is larger gets a run of its own."""
    runs: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not runs or entry.nbytes > room:
            runs.append([])
            room = limit_bytes
        runs[-1].append(entry)
        room -= entry.nbytes
    return [tuple(run) for run in runs]


def file_name(stem: str, number: int, count: int) -> str:
    """The name of file `number` (from 1) of `count`, as the Hub writes it."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def make_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: size and JSON, padded so that data begins at a multiple of 4096."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        end = at + entry.nbytes
        table[entry.key] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = round_up(8 + len(text), ROW_ALIGN) - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


def write_shard(file: Path, shard: Shard, chunks: Iterable[memoryview], progress: Callable[[int], object]) -> None:
    """Write one file and flush it to the disk; `chunks` are the bytes of its entries. `progress(bytes)` after each."""
    with file.open("xb", buffering=0) as stream:
        for chunk in itertools.chain([memoryview(shard.header)], chunks):
            rest = chunk
            while rest:
                rest = rest[stream.write(rest) :]
            progress(chunk.nbytes)
        if stream.tell() != shard.nbytes:
            raise ValueError(f"{file}: {stream.tell()} bytes were written, its header says {shard.nbytes}")
        _flush_to_disk(stream)


class Filling:
    """New files whose tensors are written in any order; each file is flushed and closed when it has all its bytes.

    `ranges` says where each tensor lies.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self.ranges = Headers()
        self._shards = {folder / shard.name: shard for shard in shards}
        self._missing = {file: shard.nbytes for file, shard in self._shards.items()}
        self._open: dict[Path, FileIO] = {}
        for file, shard in self._shards.items():
            at = len(shard.header)
            for entry in shard.entries:
                self.ranges[entry.key] = TensorRange(file, at, entry.nbytes, entry.shape, entry.dtype)
                at += entry.nbytes

    def write(self, where: TensorRange, data: memoryview) -> None:
        """Write the bytes of one tensor, or of one expert's slice of it; each once."""
        if where.file not in self._open:
            self._open[where.file] = where.file.open("xb", buffering=0)
            self._put(where.file, 0, memoryview(self._shards[where.file].header))
        self._put(where.file, where.offset, data)

    def copy(self, key: str, source: TensorRange) -> None:
        """Write the bytes of tensor `key` as they lie in another file, a piece at a time."""
        target, at = self.ranges[key], 0
        with source.file.open("rb", buffering=0) as stream:
            stream.seek(source.offset)
            while data := stream.read(min(COPIED_BYTES, source.nbytes - at)):
                self.write(replace(target, offset=target.offset + at), memoryview(data))
                at += len(data)

    def check_complete(self) -> None:
        lacking = {file.name: missing for file, missing in self._missing.items() if missing}
        if lacking:
            raise ValueError(f"bytes were never written, or more than once: {lacking}")

    def close(self) -> None:
        for stream in self._open.values():
            stream.close()

    def _put(self, file: Path, offset: int, data: memoryview) -> None:
        stream = self._open[file]
        at = 0
        while at < data.nbytes:
            at += os.pwrite(stream.fileno(), data[at:], offset + at)
        self._missing[file] -= data.nbytes
        if not self._missing[file]:
            with self._open.pop(file):
                _flush_to_disk(stream)


def _flush_to_disk(stream: FileIO) -> None:
    os.fsync(stream.fileno())
    forget_cached(stream.fileno())  # drop it from the page cache: it may be larger than memory, and is not read soon
