"""Put experts that are already in RAM on disk: one file without a name, gone with the process.

The file is unlinked as soon as it exists: a crash, at any moment, leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...checkpoint.row_index import RowIndex, RowSource, row_at
from ...config.sizes import format_size
from ...errors import OffloadError
from ...experts import MoELayer
from ...files.file_stamp import FileStamp
from ...files.opened import create_private
from ...files.system import forget_cached, sync_data
from .disk import DiskStore
from .host import pack_row


def spill_layers(
    moe_layers: Sequence[MoELayer],
    chosen: Sequence[MoELayer],
    folder: Path,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> DiskStore:
    """Write the rows of the `chosen` layers to one new file in `folder`; return a store over it.

    Layers of the store are numbered like `moe_layers`; those not chosen hold no expert. Rows follow each other, each
    aligned to 4 KiB, and pass through one row's worth of memory. `progress(bytes)` is called after each row.
    The model is not changed. Raises `OffloadError` stating bytes needed and free when the folder cannot take them; what
    was written is given back then.
    """
    total = sum(moe.nbytes for moe in chosen)
    file = folder / f".moe_offload-{uuid.uuid4().hex[:8]}.rows"
    undo = contextlib.ExitStack()
    try:
        undo.callback(file.unlink, missing_ok=True)
        opened = undo.enter_context(create_private(file))
        file.unlink()
        if shutil.disk_usage(folder).free < total:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # said before writing begins, not when it fails
        _write_rows(opened.fileno(), chosen, progress)
        index = _index(file, moe_layers, chosen, FileStamp.of(opened.fileno()))
    except BaseException as error:
        undo.close()
        if isinstance(error, OSError):
            raise _cannot_spill(folder, total, error) from error
        raise
    return DiskStore([moe.layout for moe in moe_layers], index, {file: opened})


def _write_rows(descriptor: int, chosen: Sequence[MoELayer], progress: Callable[[int], object]) -> None:
    done = 0
    for moe in chosen:
        row = torch.zeros(moe.layout.row_bytes, dtype=torch.uint8, device="cpu")
        for e in range(moe.num_experts):
            pack_row(moe, e, row)
            rest = row.numpy().data
            while rest:
                count = os.pwrite(descriptor, rest, done)
                done, rest = done + count, rest[count:]
            progress(row.nbytes)
    sync_data(descriptor)
    forget_cached(descriptor)  # the page cache would hold as much RAM as was freed


def _index(file: Path, moe_layers: Sequence[MoELayer], chosen: Sequence[MoELayer], stamp: FileStamp) -> RowIndex:
    rows: dict[int, tuple[RowSource, ...]] = {}
    begin = 0
    for moe in chosen:
        starts = range(begin, begin + moe.nbytes, moe.layout.row_bytes)
        rows[moe.index] = tuple(row_at(file, start, moe) for start in starts)
        begin += moe.nbytes
    layers = tuple(rows.get(moe.index, ()) for moe in moe_layers)
    return RowIndex(tuple(moe.name for moe in moe_layers), layers, frozenset(), {file: stamp})


def _cannot_spill(folder: Path, total: int, error: OSError) -> OffloadError:
    try:
        free = f"{format_size(shutil.disk_usage(folder).free)} free"
    except OSError:
        free = "free space unknown"
    return OffloadError(
        f"{folder}: cannot take the {format_size(total)} ({total} bytes) of experts that are to rest on disk: "
        f"{error.strerror} ({free}). Give offload_folder a place with enough space, or load from a checkpoint, whose "
        "own files are read in place"
    )
