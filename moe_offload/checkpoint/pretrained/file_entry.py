"""`FileEntry`: a tensor of a file as transformers' loader asks for it, whole or a part of it.

The library's own entries read a tensor whole, also for a rank that keeps a few of its rows, into memory that begins
where malloc has it. Here only what is asked for is read, and float32 begins as far from a cache line as it does in the
file. That is where plain transformers has it, which maps the file; and the bits of a product depend on it
(`experts/layout.py`). Tensors of half of all files begin 8 bytes beyond a multiple of 16.
"""

from __future__ import annotations

import os
from io import FileIO
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointChangedError, CheckpointError
from ...experts import FIELD_ALIGN, PLACED
from ...files.file_stamp import FileStamp
from ..headers import DTYPE_NAMES, Headers, TensorRange

PART_BYTES = 8 << 20  # of columns: they are picked out of so much of the file at a time


class FileEntries:
    """The entry of each key of `headers`. A file is opened once, and known to be the one that they were read from."""

    def __init__(self, headers: Headers):
        self._headers, self._files = headers, dict[Any, FileIO]()

    def __getitem__(self, key: str) -> FileEntry:
        """Raises `CheckpointChangedError`; `CheckpointError` for a file that cannot be opened."""
        found = self._headers[key]
        if found.file not in self._files:
            try:
                file = FileIO(found.file)
                stamp = FileStamp.of(file.fileno())
            except OSError as error:
                raise CheckpointError(f"{found.file}: cannot be opened ({error.strerror}); restore it") from error
            if self._headers.stamps[found.file].followed_by(stamp, found.file) is None:
                raise CheckpointChangedError(f"{found.file}: was modified while the model was loaded; load it again")
            self._files[found.file] = file
        return FileEntry(found, self._files[found.file], key)

    def close(self) -> None:
        """Nothing is read any more. A thread of the loader that still does, after an error of another, is told that its
        file is closed."""
        for file in self._files.values():
            file.close()


class FileEntry:
    """A tensor that is read when it is indexed, by any thread. Its interface is that of the library's slices."""

    def __init__(self, found: TensorRange, file: FileIO, key: str):
        self._found, self._file, self._key = found, file, key

    def get_shape(self) -> list[int]:
        return list(self._found.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self._found.dtype]

    def __getitem__(self, part: Any) -> Tensor:
        """`part`: `...`, or slices. Raises `CheckpointError` where the file has become shorter, or cannot be read."""
        if not all(isinstance(one, (slice, EllipsisType)) for one in (part if isinstance(part, tuple) else (part,))):
            raise TypeError(f"{self._key}: asked for {part!r} of a tensor in a file; slices are what it has")
        dtype = self._found.dtype
        like: Tensor = torch.empty(self._found.shape, dtype=dtype, device="meta")[part]
        if like.is_contiguous():
            return self._read(int(like.storage_offset()), like.numel(), placed=dtype in PLACED).view(like.shape)
        out = torch.empty(like.shape, dtype=dtype, device="cpu")
        rows = max(1, PART_BYTES // (like.stride(0) * dtype.itemsize))
        for first in range(0, len(like), rows):
            some = like[first : first + rows]
            span = 1 + sum((size - 1) * stride for size, stride in zip(some.shape, some.stride(), strict=True))
            read = self._read(int(some.storage_offset()), span)
            out[first : first + rows] = read.as_strided(some.shape, some.stride())
        return out

    def _read(self, first: int, count: int, placed: bool = False) -> Tensor:
        """So many elements from the `first` on; if they are `placed`, as far from a cache line as in the file."""
        dtype = self._found.dtype
        offset, nbytes = self._found.offset + first * dtype.itemsize, count * dtype.itemsize
        begin = (self._found.begin + first * dtype.itemsize) % FIELD_ALIGN if placed else 0
        # What is new begins at a cache line.
        bytes_N = torch.empty(begin + nbytes, dtype=torch.uint8, device="cpu")[begin:]
        self._fill(memoryview(bytes_N.numpy()), offset)
        return bytes_N.view(dtype)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer.nbytes:
            try:
                count = os.preadv(self._file.fileno(), [buffer], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self._found.file}: reading {buffer.nbytes} bytes of {self._key!r} at offset {offset} failed "
                    f"({error.strerror}). Check the disk or the network mount, and load the model again"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self._found.file}: was truncated while the model was loaded: {buffer.nbytes} bytes of "
                    f"{self._key!r} are missing at offset {offset}. Restore it, and load the model again"
                )
            buffer, offset = buffer[count:], offset + count
