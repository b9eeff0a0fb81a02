"""The bytes of a packed checkpoint's files, in the order in which they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .buffers import page_aligned
from .checkpoint import Headers
from .errors import CheckpointChangedError
from .experts import ExpertBank
from .shards import Shard
from .stores import Store
from .stores.direct import DataFile
from .stores.reads import PART_BYTES


def dense_parts(shard: Shard, headers: Headers) -> Iterator[memoryview]:
    """The bytes of a shard's dense tensors, part by part; each view is good until the next one is asked for.

    Raises `ExpertReadError` or `CheckpointChangedError` when the original cannot be read, or is no longer the one that
    `headers` were read from.
    """
    part = page_aligned(PART_BYTES).numpy().data
    with contextlib.ExitStack() as opened:
        files: dict[Path, DataFile] = {}
        for entry in shard.entries:
            range_ = headers[entry.key]
            if range_.file not in files:
                descriptor = os.open(range_.file, os.O_RDONLY | os.O_CLOEXEC)
                files[range_.file] = opened.enter_context(contextlib.closing(DataFile(range_.file, descriptor)))
            for at in range(0, range_.nbytes, PART_BYTES):
                chunk = part[: min(PART_BYTES, range_.nbytes - at)]
                files[range_.file].read(range_.offset + at, [chunk], entry.key)
                yield chunk
        for path, file in files.items():
            if file.stamp() != headers.stamps[path]:
                raise CheckpointChangedError(f"{path}: was modified while it was packed. Let it rest and pack again.")


def expert_rows(shard: Shard, banks: Sequence[ExpertBank], store: Store) -> Iterator[memoryview]:
    """The rows of a shard's layers; each view is good until the next one is asked for. Padding is zero."""
    keys = {entry.key for entry in shard.entries}
    for bank in (bank for bank in banks if bank.name in keys):
        row = page_aligned(bank.layout.row_bytes)
        ends = [(field.offset, field.offset + field.nbytes) for field in bank.layout.fields]
        gaps = zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(row)], strict=True)
        padding = [row[start:stop] for start, stop in gaps]
        for e in range(bank.num_experts):
            store.read(bank.index, e, row.numpy().data)
            for span in padding:
                span.zero_()
            yield row.numpy().data
