"""Arrays of an `.npz` (a zip of `.npy`), read as hostile input: every size is checked before anything is allocated."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Collection
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2**30  # of one array, unpacked
MAX_DIRECTORY_BYTES = 2**16

_END = struct.Struct("<4sHHHHIIH")  # the record that ends a zip: signature, disks, entries, directory size, offset
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, OverflowError, RuntimeError)  # as zipfile has it
_ZIP64 = b"PK\x06\x07"


def read(file: BinaryIO, size: int, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Those of the arrays `names` that `file`, of `size` bytes, holds. Raises ValueError (and OSError)."""
    try:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            held = set(archive.namelist())
            return {name: _array(archive, name) for name in names if f"{name}.npy" in held}
    except _DAMAGE as error:
        raise ValueError(f"it is no intact .npz: {error}") from error


def _check_directory(file: BinaryIO, size: int) -> None:
    """zipfile reads the whole table of contents, however long it says it is: so it must be short."""
    tail_bytes = 20 + _END.size
    file.seek(max(0, size - tail_bytes))
    tail = file.read(tail_bytes)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise ValueError("it is no .npz, or its end is missing")
    directory_bytes = _END.unpack(tail[-_END.size :])[5]
    if directory_bytes > MAX_DIRECTORY_BYTES or _ZIP64 in tail:
        raise ValueError(f"its table of contents has {directory_bytes} bytes; the limit is {MAX_DIRECTORY_BYTES}")


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{name} is an array of format {version}")
        shape, _, dtype = readers[version](member)
        data_bytes = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "iuf":
            raise ValueError(f"{name} is an array of {str(dtype)[:40]}, not of numbers")
        if data_bytes > MAX_BYTES or min(shape, default=0) < 0:
            raise ValueError(f"{name} would have {data_bytes} bytes; the limit is {MAX_BYTES}")
        if info.file_size != member.tell() + data_bytes:
            raise ValueError(f"{name} states {data_bytes} bytes, and holds {info.file_size - member.tell()}")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
