"""How one expert is read: which bytes of which files go where in its row, cut into parts that can be read at once.

row of one expert    file A, 3 MB at 123456, 3 MB after it -> row[0:3 MB], row[3 MB:6 MB]      merged: one read
                     file B, ...                           -> scratch, converted into the row at the end

merged               neighbours in a file become one read; so do ranges a few bytes apart both in the file and in
                     the row (the padding between fields is read along: nobody looks at it)
cut                  a read longer than PART_BYTES becomes several, at page boundaries of the file
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ...checkpoint.row_index import Piece, RowSource
from ...experts import FIELD_ALIGN, round_up
from ...files.file_stamp import FileStamp

#: The longest single read. Measured on a virtio disk, reads of 1 to 3 MB were equally fast; a row of 9 MB in one read
#: would keep one thread busy and leave the others idle whenever only one row is missing.
PART_BYTES = 2 << 20
PAGE = 4096


@dataclass(frozen=True)
class Span:
    """`row[start:stop]`, or `scratch[start:stop]` for bytes that need converting."""

    in_row: bool
    start: int
    stop: int


@dataclass(frozen=True)
class FileRead:
    """Contiguous bytes of one file, spread over `spans`."""

    file: Path
    offset: int
    spans: tuple[Span, ...]

    @property
    def end(self) -> int:
        return self.offset + sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class RowPlan:
    """`parts` may be read in any order; then each of `convert`: a field, with its sources' offsets in the scratch."""

    parts: tuple[FileRead, ...]
    convert: tuple[tuple[Piece, tuple[int, ...]], ...]
    scratch_bytes: int
    nbytes: int

    @property
    def files(self) -> set[Path]:
        return {part.file for part in self.parts}

    @property
    def packed(self) -> bool:
        """Whether the row lies in one piece, from a page boundary on, as a slot holds it."""
        joined = all(a.file == b.file and a.end == b.offset for a, b in pairwise(self.parts))
        return joined and not self.convert and all(part.offset % PAGE == 0 for part in self.parts)


def plan_row(source: RowSource, row_bytes: int, stamps: Mapping[Path, FileStamp]) -> RowPlan:
    """Lay the reads of one expert out."""
    reads: list[FileRead] = []
    convert: list[tuple[Piece, tuple[int, ...]]] = []
    scratch = nbytes = 0
    for piece in source:
        at, offsets = piece.field.offset, []
        for part in piece.sources:
            if not piece.direct:
                at, scratch = scratch, round_up(scratch + part.nbytes, FIELD_ALIGN)
                offsets.append(at)
            if part.nbytes:
                reads.append(FileRead(part.file, part.offset, (Span(piece.direct, at, at + part.nbytes),)))
            nbytes += part.nbytes
            at += part.nbytes
        if not piece.direct:
            convert.append((piece, tuple(offsets)))
    data_end = max(piece.field.offset + piece.field.nbytes for piece in source)
    whole = [_padded(read, data_end, row_bytes, stamps[read.file].size) for read in _merged(reads)]
    return RowPlan(tuple(part for read in whole for part in _cut(read)), tuple(convert), scratch, nbytes)


def _merged(reads: Iterable[FileRead]) -> list[FileRead]:
    merged: list[FileRead] = []
    for read in sorted(reads, key=lambda read: (read.file, read.offset)):
        if merged and _continues(merged[-1], read):
            last = merged.pop()
            read = FileRead(last.file, last.offset, _joined(last, read))
        merged.append(read)
    return merged


def _continues(last: FileRead, read: FileRead) -> bool:
    """Whether one read can fetch both: nothing lies between them, or the same few bytes do in the file and the row."""
    gap = read.offset - last.end
    tail, head = last.spans[-1], read.spans[0]
    same_gap = tail.in_row and head.in_row and head.start - tail.stop == gap and gap < FIELD_ALIGN
    return last.file == read.file and (gap == 0 or same_gap)


def _joined(last: FileRead, read: FileRead) -> tuple[Span, ...]:
    tail, head, gap = last.spans[-1], read.spans[0], read.offset - last.end
    if (tail.in_row, tail.stop + gap) == (head.in_row, head.start):
        return (*last.spans[:-1], Span(tail.in_row, tail.start, head.stop))
    return (*last.spans, head)


def _padded(read: FileRead, data_end: int, row_bytes: int, file_bytes: int) -> FileRead:
    """Read along the padding at the row's ends, where the file has as many bytes: whole pages need no detour.

    At the end only behind the last field: what lies before another one is not padding, though it may be in the row's
    last page.
    """
    first, *others = read.spans
    # A matrix may begin a few bytes past the row's first (`experts/layout.py`).
    if first.in_row and 0 < first.start < FIELD_ALIGN and (read.offset - first.start) % PAGE == 0:
        read = FileRead(read.file, read.offset - first.start, (Span(True, 0, first.stop), *others))
    *rest, last = read.spans
    pad = row_bytes - last.stop
    behind_all = last.in_row and last.stop == data_end
    if behind_all and 0 < pad < PAGE and read.offset % PAGE == 0 and read.end + pad <= file_bytes:
        return FileRead(read.file, read.offset, (*rest, Span(True, last.start, row_bytes)))
    return read


def _cut(read: FileRead) -> Iterable[FileRead]:
    offset, spans = read.offset, list(read.spans)
    while spans:
        room = round_up(offset + 1, PAGE) - PAGE + PART_BYTES - offset  # up to a page boundary of the file
        taken: list[Span] = []
        while spans and room:
            span = spans.pop(0)
            size = min(room, span.stop - span.start)
            taken.append(Span(span.in_row, span.start, span.start + size))
            room -= size
            if size < span.stop - span.start:
                spans.insert(0, Span(span.in_row, span.start + size, span.stop))
        yield FileRead(read.file, offset, tuple(taken))
        offset += sum(span.stop - span.start for span in taken)
