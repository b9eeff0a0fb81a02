"""Rows resting in files: read with `preadv`, straight into the row wherever the file has the same bytes.

    plan of one expert    read  file A, 40 MB at 123456   -> row[16 MB:24 MB], row[0:8 MB], row[8 MB:16 MB]   one preadv
                          read  file B, ...               -> scratch                                        to convert
                          convert scratch                 -> row

Descriptors are opened once and kept, so a checkpoint that is deleted or replaced meanwhile is still read as it was. A
file that was modified in place is noticed (size, modification time) and never served. Nothing is memory-mapped.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import FileStamp
from ..conversion import run_steps
from ..errors import CheckpointChangedError, CheckpointError, ClosedError, ExpertReadError
from ..experts import FIELD_ALIGN, RowLayout, round_up
from ..rows import Piece, RowIndex, RowSource
from .request import check_request

PASSING_ERRORS = (errno.EIO, errno.EAGAIN)  # tried once more: a flaky link or controller often recovers


@dataclass(frozen=True)
class _Span:
    """`row[start:stop]`, or `scratch[start:stop]` for bytes that need converting."""

    in_row: bool
    start: int
    stop: int


@dataclass(frozen=True)
class _Read:
    """Contiguous bytes of one file, spread over `spans`."""

    file: Path
    offset: int
    spans: tuple[_Span, ...]

    @property
    def end(self) -> int:
        return self.offset + sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class _Plan:
    """How one expert is read: `convert` lists each field to convert with its sources' offsets in the scratch buffer."""

    reads: tuple[_Read, ...]
    convert: tuple[tuple[Piece, tuple[int, ...]], ...]
    scratch_bytes: int


class DiskStore:
    """The rows of `index`, one layout per layer.

    `descriptors` may give some of the files already open; the store takes them over. Raises `CheckpointError` when a
    file cannot be opened, `CheckpointChangedError` when it is no longer the one that was indexed.
    """

    def __init__(self, layouts: Sequence[RowLayout], index: RowIndex, descriptors: Mapping[Path, int] | None = None):
        self._row_bytes = [layout.row_bytes for layout in layouts]
        self._counts = [len(layer) for layer in index.rows]
        self._names, self._stamps = index.names, index.stamps
        self._plans = [[_plan(source) for source in layer] for layer in index.rows]
        self._lock = threading.Lock()
        self._reading = 0
        self._closed = False
        self._descriptors = dict(descriptors or {})
        try:
            for file in sorted({r.file for layer in self._plans for plan in layer for r in plan.reads}):
                self._open(file)
        except BaseException:
            self.close()
            raise

    def read(self, layer: int, expert: int, row: memoryview) -> int:
        with self._open_for_reading():
            check_request(layer, expert, self._counts, row, self._row_bytes)
            plan = self._plans[layer][expert]
            scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8).numpy().data
            who = f"{self._names[layer]} expert {expert}"
            for read in plan.reads:
                self._fill(read, row, scratch, who)
            for file in {read.file for read in plan.reads}:  # after the bytes: a change while they were read counts
                self._check_unchanged(file, who)
        for piece, offsets in plan.convert:
            _convert(piece, offsets, scratch, row)
        return sum(read.end - read.offset for read in plan.reads)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._close_if_idle()

    def _open(self, file: Path) -> None:
        try:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            found = FileStamp.of(self._descriptors[file])
        except OSError as error:
            hint = "raise `ulimit -n`" if error.errno == errno.EMFILE else "check that it is there and may be read"
            raise CheckpointError(f"{file}: cannot be opened to read experts: {error}; {hint}.") from error
        if found != self._stamps[file]:
            raise CheckpointChangedError(
                f"{file}: replaced or modified since its header was read; let what writes it finish, then load again."
            )

    @contextmanager
    def _open_for_reading(self) -> Iterator[None]:
        """Hold the descriptors open: a number closed under a reader could by then be another file's."""
        with self._lock:
            if self._closed:
                raise ClosedError("this store was closed, and its files with it. Offload the model again to go on.")
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closed and not self._reading:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _fill(self, read: _Read, row: memoryview, scratch: memoryview, who: str) -> None:
        buffers = [(row if span.in_row else scratch)[span.start : span.stop] for span in read.spans]
        at, retried = read.offset, False
        while buffers:
            try:
                count = os.preadv(self._descriptors[read.file], buffers, at)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in PASSING_ERRORS and not retried:
                    retried = True
                    continue
                name = errno.errorcode.get(error.errno or 0, "unknown errno")
                raise ExpertReadError(
                    f"{who}: reading {read.end - at} bytes at offset {at} of {read.file} failed"
                    f"{' twice' if retried else ''} with {name} ({error.strerror}). Check the disk or the network "
                    "mount; the next call tries again."
                ) from error
            if count == 0:
                raise ExpertReadError(
                    f"{who}: {read.file} was truncated: {read.end - at} bytes are missing at offset {at}; it had "
                    f"{self._stamps[read.file].size} bytes when it was indexed. Restore it and load the model again."
                )
            at += count
            buffers = _after(buffers, count)

    def _check_unchanged(self, file: Path, who: str) -> None:
        try:
            found, known = FileStamp.of(self._descriptors[file]), self._stamps[file]
        except OSError as error:
            raise ExpertReadError(f"{who}: {file} can no longer be examined: {error}. Check the mount.") from error
        if found != known:
            raise CheckpointChangedError(
                f"{who}: {file} was modified after it was opened ({known.size} bytes then, {found.size} now); its "
                "bytes are not used. Restore it and load the model again; to update a checkpoint, write a new file and "
                "rename it."
            )


def _plan(source: RowSource) -> _Plan:
    """Lay the reads of one expert out, with neighbours in a file merged into one read."""
    reads: list[_Read] = []
    convert: list[tuple[Piece, tuple[int, ...]]] = []
    scratch = 0
    for piece in source:
        at, offsets = piece.field.offset, []
        for part in piece.sources:
            if not piece.direct:
                at, scratch = scratch, round_up(scratch + part.nbytes, FIELD_ALIGN)
                offsets.append(at)
            reads.append(_Read(part.file, part.offset, (_Span(piece.direct, at, at + part.nbytes),)))
            at += part.nbytes
        if not piece.direct:
            convert.append((piece, tuple(offsets)))
    merged: list[_Read] = []
    for read in sorted(reads, key=lambda read: (read.file, read.offset)):
        if merged and merged[-1].file == read.file and merged[-1].end == read.offset:
            merged[-1] = _Read(read.file, merged[-1].offset, _joined(merged[-1].spans, read.spans[0]))
        elif read.end > read.offset:
            merged.append(read)
    return _Plan(tuple(merged), tuple(convert), scratch)


def _joined(spans: tuple[_Span, ...], span: _Span) -> tuple[_Span, ...]:
    last = spans[-1]
    if (last.in_row, last.stop) == (span.in_row, span.start):
        return (*spans[:-1], _Span(last.in_row, last.start, span.stop))
    return (*spans, span)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill after `count` bytes."""
    while buffers and count >= buffers[0].nbytes:
        count -= buffers[0].nbytes
        buffers = buffers[1:]
    return [buffers[0][count:], *buffers[1:]] if buffers else []


def _convert(piece: Piece, offsets: Sequence[int], scratch: memoryview, row: memoryview) -> None:
    """Cast, join and reorder one field's sources; the last step writes straight into the row."""
    dtype = piece.field.dtype
    tensors = [
        torch.frombuffer(scratch, dtype=s.dtype, count=math.prod(s.shape), offset=at).view(s.shape).to(dtype)
        for s, at in zip(piece.sources, offsets, strict=True)
    ]
    out = torch.frombuffer(row, dtype=dtype, count=math.prod(piece.field.shape), offset=piece.field.offset)
    out.view(piece.field.shape).copy_(run_steps(piece.steps, tensors))
