"""The disk store: rows in checkpoint files (or a spill file), each a handful of reads that threads share.

Descriptors are opened once and kept, so a checkpoint that is deleted or replaced meanwhile is still read as it was. A
file that was modified in place is noticed (`files/file_stamp.py`) and never served. Nothing is memory-mapped.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path

import torch

from ...checkpoint.conversion import convert_tensors
from ...checkpoint.quantised.weights import find_fault
from ...checkpoint.row_index import Piece, RowIndex
from ...errors import CheckpointChangedError, CheckpointError, ClosedError, ExpertReadError
from ...experts import RowLayout
from ...files.file_stamp import FileStamp
from .direct_io import DataFile
from .row_read import RowRead, check_request
from .row_reads import FileRead, RowPlan, plan_row


class DiskStore:
    """The rows of `index`, one layout per layer.

    `opened` may give some of the files already open; the store takes them over. Raises `CheckpointError` when a
    file cannot be opened, `CheckpointChangedError` when it is no longer the one that was indexed.
    """

    def __init__(self, layouts: Sequence[RowLayout], index: RowIndex, opened: Mapping[Path, FileIO] | None = None):
        self._row_bytes = [layout.row_bytes for layout in layouts]
        self._counts = [len(layer) for layer in index.rows]
        self._names, self._stamps = index.names, dict(index.stamps)
        self._first = index.first or (0,) * len(index.rows)
        self._packings = index.packings or (None,) * len(index.rows)
        self._lock = threading.Lock()
        self._reading, self._pid = 0, os.getpid()
        self._closed = False
        self._files: dict[Path, DataFile] = {}
        given = dict(opened or {})
        try:
            self._plans = [
                [plan_row(source, layout.row_bytes, index.stamps) for source in layer]
                for layer, layout in zip(index.rows, layouts, strict=True)
            ]
            for file in sorted({file for layer in self._plans for plan in layer for file in plan.files}):
                self._open(file, given.pop(file, None))
        except BaseException:
            self.close()
            raise
        finally:
            for unused in given.values():
                unused.close()

    @property
    def packed(self) -> bool:
        """Whether every row is read in one piece and without conversion (by the first of each layer)."""
        return all(plans[0].packed for plans in self._plans if plans)

    @property
    def how(self) -> set[str]:
        """How its files are read: past the page cache, or through it."""
        return {file.how for file in self._files.values()}

    @property
    def files(self) -> list[Path]:
        return list(self._files)

    def begin(self, layer: int, expert: int, row: memoryview) -> RowRead:
        if self._closed:
            raise self._is_closed()
        check_request(layer, expert, self._counts, row, self._row_bytes)
        plan = self._plans[layer][expert]
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device="cpu").numpy().data
        who = f"{self._names[layer]} expert {self._first[layer] + expert}"
        parts = [partial(self._fill, part, row, scratch, who) for part in plan.parts]
        return RowRead(parts, partial(self._finish, plan, row, scratch, who, layer))

    def read(self, layer: int, expert: int, row: memoryview) -> int:
        return self.begin(layer, expert, row).run()

    def close(self) -> None:
        if os.getpid() != self._pid:  # forked: no thread reads here, and one that is not here may hold the lock
            self._lock, self._reading = threading.Lock(), 0
        with self._lock:
            self._closed = True
            self._close_if_idle()

    def _open(self, file: Path, opened: FileIO | None) -> None:
        try:
            self._files[file] = DataFile(file, opened)
            found = self._files[file].stamp()
        except OSError as error:
            hint = "raise `ulimit -n`" if error.errno == errno.EMFILE else "check that it is there and may be read"
            raise CheckpointError(f"{file}: cannot be opened to read experts: {error}; {hint}") from error
        if not self._is_unchanged(file, found):
            raise CheckpointChangedError(
                f"{file}: replaced or modified since its header was read; let what writes it finish, then load again"
            )

    def _fill(self, part: FileRead, row: memoryview, scratch: memoryview, who: str) -> None:
        with self._open_for_reading():
            buffers = [(row if span.in_row else scratch)[span.start : span.stop] for span in part.spans]
            self._files[part.file].read(part.offset, buffers, who)

    def _finish(self, plan: RowPlan, row: memoryview, scratch: memoryview, who: str, layer: int) -> int:
        with self._open_for_reading():
            for file in plan.files:  # after the bytes: a change while they were read counts
                self._check_unchanged(file, who)
        for piece, offsets in plan.convert:
            _convert(piece, offsets, scratch, row)
        packing = self._packings[layer]
        fault = packing and find_fault(packing.weights, torch.frombuffer(row, dtype=torch.uint8))
        if fault:
            raise CheckpointError(
                f"{who}: {fault}, in {', '.join(sorted(str(file) for file in plan.files))}. The checkpoint is damaged, "
                "or was made by something that does not keep to its format; download it again"
            )
        return plan.nbytes

    @contextmanager
    def _open_for_reading(self) -> Iterator[None]:
        """Hold the descriptors open: a number closed under a reader could by then be another file's."""
        with self._lock:
            if self._closed:
                raise self._is_closed()
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                self._close_if_idle()

    def _is_closed(self) -> ClosedError:
        return ClosedError("this store was closed, and its files with it. Offload the model again to go on")

    def _close_if_idle(self) -> None:
        if self._closed and not self._reading:
            while self._files:
                self._files.popitem()[1].close()

    def _is_unchanged(self, file: Path, found: FileStamp) -> bool:
        known = self._stamps[file]
        stamp = known.followed_by(found, file)
        if stamp is not None and stamp is not known:
            self._stamps[file] = stamp
        return stamp is not None

    def _check_unchanged(self, file: Path, who: str) -> None:
        known = self._stamps[file]
        try:
            found: FileStamp = self._files[file].stamp()
        except OSError as error:
            raise ExpertReadError(f"{who}: {file} can no longer be examined: {error}. Check the mount") from error
        if not self._is_unchanged(file, found):
            raise CheckpointChangedError(
                f"{who}: {file} was modified after it was opened ({known.size} bytes then, {found.size} now); its "
                "bytes are not used. Restore it and load the model again; to update a checkpoint, write a new file and "
                "rename it"
            )


def _convert(piece: Piece, offsets: Sequence[int], scratch: memoryview, row: memoryview) -> None:
    """Cast, join and reorder one field's sources; the last step writes straight into the row."""
    dtype = piece.field.dtype
    tensors = [
        torch.frombuffer(scratch, dtype=s.dtype, count=math.prod(s.shape), offset=at).view(s.shape).to(dtype)
        for s, at in zip(piece.sources, offsets, strict=True)
    ]
    out = torch.frombuffer(row, dtype=dtype, count=math.prod(piece.field.shape), offset=piece.field.offset)
    out.view(piece.field.shape).copy_(convert_tensors(piece.conversions, tensors))
