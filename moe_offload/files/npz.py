"""Arrays of an `.npz` (a zip of `.npy`), read as hostile input: every size is checked before anything is allocated.

numpy's own reader hands an array's header to a parser of Python, and allocates what the header asks for. Here a header
is numbers in one fixed form, as numpy writes it, and what all arrays take together is bounded by what is on disk: what
was recorded compresses to a half or a third, and a file that unpacks to a hundred times its size was made to do harm.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2**27  # of all arrays, unpacked: 64 MB of ids are recorded at most, and as much again of weights
SMALL_BYTES = 2**24  # what any file may unpack to
MAX_RATIO = 64  # of unpacked bytes to those on disk
MAX_DIRECTORY_BYTES = 2**16
MAX_HEADER_BYTES = 2**12

_END = struct.Struct("<4sHHHHIIH")  # the record that ends a zip: signature, disks, entries, directory size, offset
#: What zipfile and its decompressors raise for damage.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, OverflowError, RuntimeError, LookupError, TypeError)
_ZIP64 = b"PK\x06\x07"
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,40})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), ?\} *\n"
)
_NUMBERS = re.compile(r"[<>|=]?([iu][1248]|f[248])")


def read_arrays(file: BinaryIO, size: int, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Those of the arrays `names` that `file`, of `size` bytes, holds. Raises ValueError (and OSError)."""
    try:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            held = set(archive.namelist())
            room, found = min(MAX_BYTES, max(SMALL_BYTES, MAX_RATIO * size)), {}
            for name in sorted({*names}):
                if f"{name}.npy" in held:
                    found[name] = _array(archive, name, room)
                    room -= found[name].nbytes
            return found
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


def _array(archive: zipfile.ZipFile, name: str, room: int) -> NDArray[Any]:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed otherwise than numpy does it")
    with archive.open(info) as member:
        shape, order, dtype = _header(member, name)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > room:
            raise ValueError(f"{name} would have {nbytes} bytes; the limit is {room} for the arrays of this file")
        if info.file_size != member.tell() + nbytes:
            raise ValueError(f"{name} states {nbytes} bytes, and holds {info.file_size - member.tell()}")
        data = member.read(nbytes)
        if len(data) != nbytes or member.read(1):  # past the end it checks the sum, too
            raise ValueError(f"{name} states {nbytes} bytes, and has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _header(member: IO[bytes], name: str) -> tuple[tuple[int, ...], Any, np.dtype[Any]]:
    """Shape, order ("C" or "F") and dtype, as a `.npy` states them; `member` is then where its data begins."""
    start = member.read(8)
    if start[:6] != b"\x93NUMPY":
        raise ValueError(f"{name} is no array: the magic of .npy is missing")
    if start[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError(f"{name} is an array of format {tuple(start[6:])}")
    header_bytes = int.from_bytes(member.read(2 if start[6] == 1 else 4), "little")
    stated = _HEADER.fullmatch(member.read(header_bytes)) if header_bytes <= MAX_HEADER_BYTES else None
    if stated is None:
        raise ValueError(f"{name} has a header other than numpy's")
    descr, order, shape = (group.decode("latin-1") for group in stated.groups())
    if not _NUMBERS.fullmatch(descr):
        raise ValueError(f"{name} is an array of {descr}, not of numbers")
    return tuple(int(n) for n in shape.split(",") if n.strip()), "F" if order == "True" else "C", np.dtype(descr)
