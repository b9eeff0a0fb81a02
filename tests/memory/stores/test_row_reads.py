"""The parts of a row are read in any order, and at once: none may write where another does."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_offload.checkpoint.headers import TensorRange
from moe_offload.checkpoint.row_index import Piece, RowIndex
from moe_offload.experts import FIELD_ALIGN, Field, RowLayout
from moe_offload.files.file_stamp import FileStamp
from moe_offload.memory.buffers import page_aligned
from moe_offload.memory.stores.disk import DiskStore
from moe_offload.memory.stores.row_reads import PAGE, FileRead, RowPlan, Span, _merged, plan_row

LAYOUT = RowLayout.of(
    {
        "down_proj": torch.empty(1, PAGE),  # four pages
        "down_proj_bias": torch.empty(1, 64),  # both in the last page of a row, as in gpt-oss
        "gate": torch.empty(1, 32),
    }
)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_field_on_a_page_of_its_file_before_others_in_the_last_page_of_its_row(order, tmp_path: Path) -> None:
    """What follows it in the file is not read along into its neighbours' place."""
    pieces, want = [], []
    for number, field in enumerate(LAYOUT.fields):
        file = tmp_path / f"{number}.safetensors"
        values = np.full(field.nbytes // 4, 1.0 + number, np.float32)
        file.write_bytes(bytes(PAGE) + values.tobytes() + b"\xaa" * 2 * PAGE)
        pieces.append(Piece(field, (TensorRange(file, PAGE, field.nbytes, field.shape, field.dtype),), ()))
        want.append(values)
    stamps = {}
    for piece in pieces:
        with piece.sources[0].file.open("rb") as stream:
            stamps[piece.sources[0].file] = FileStamp.of(stream.fileno())
    store = DiskStore([LAYOUT], RowIndex(("experts",), ((tuple(pieces),),), frozenset(), stamps))
    row = page_aligned(LAYOUT.row_bytes)
    read = store.begin(0, 0, row.numpy().data)
    assert len(read.parts) == 3
    for number in order:
        read.parts[number]()
    read.finish()
    for field, values in zip(LAYOUT.fields, want, strict=True):
        found = row[field.offset : field.offset + field.nbytes].view(torch.float32).numpy()
        np.testing.assert_array_equal(found, values)
    store.close()


def test_what_ends_where_another_file_s_bytes_begin_is_not_one_read(tmp_path: Path) -> None:
    first, second = LAYOUT.fields[:2]
    end = PAGE + first.nbytes
    plan = planned({first: (tmp_path / "a", PAGE), second: (tmp_path / "b", end)}, file_bytes=end + second.nbytes)
    assert {(part.file.name, part.offset) for part in plan.parts if part.file.name == "b"} == {("b", end)}
    assert sum(part.end - part.offset for part in plan.parts if part.file.name == "a") == first.nbytes


@pytest.mark.parametrize("floats", [FIELD_ALIGN // 4, 64])
def test_the_same_gap_in_file_and_row_is_read_along_only_where_it_is_padding(floats: int, tmp_path: Path) -> None:
    """Else the middle field, which another file has, would be written over by what lies there in this one."""
    sizes = {"down_proj": PAGE, "down_proj_bias": floats, "gate": 32}
    layout = RowLayout.of({name: torch.empty(1, size) for name, size in sizes.items()})
    first, middle, last = layout.fields
    gap = last.offset - first.offset
    plan = planned(
        {first: (tmp_path / "a", PAGE), last: (tmp_path / "a", PAGE + gap), middle: (tmp_path / "b", 0)},
        file_bytes=PAGE + gap + last.nbytes,
        layout=layout,
    )
    into = sorted((span.start, span.stop) for part in plan.parts for span in part.spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(into))


def test_the_row_s_padding_is_not_read_past_the_end_of_the_file(tmp_path: Path) -> None:
    first, second, last = LAYOUT.fields
    sizes = {first: (tmp_path / "a", PAGE), second: (tmp_path / "a", PAGE + second.offset)}
    end = PAGE + last.offset + last.nbytes
    sizes[last] = tmp_path / "a", end - last.nbytes
    assert max(part.end for part in planned(sizes, file_bytes=end).parts) == end


def test_the_row_s_padding_is_read_along_up_to_the_end_of_the_file(tmp_path: Path) -> None:
    """Then the read ends where a page does, and needs no detour."""
    places = {field: (tmp_path / "a", PAGE + field.offset) for field in LAYOUT.fields}
    end = PAGE + LAYOUT.row_bytes
    assert max(part.end for part in planned(places, file_bytes=end).parts) == end


def planned(places: dict[Field, tuple[Path, int]], file_bytes: int, layout: RowLayout = LAYOUT) -> RowPlan:
    """The reads of a row whose fields lie at these offsets of files of that many bytes."""
    stamps = {}
    for file, _ in places.values():
        file.write_bytes(bytes(file_bytes))
        with file.open("rb") as stream:
            stamps[file] = FileStamp.of(stream.fileno())
    pieces = [
        Piece(field, (TensorRange(file, offset, field.nbytes, field.shape, field.dtype),), ())
        for field, (file, offset) in places.items()
    ]
    return plan_row(tuple(pieces), layout.row_bytes, stamps)


def test_a_gap_between_the_row_and_what_is_converted_is_not_read_over():
    """Their places in row and scratch may happen to be as far apart as in the file, and are in two memories."""
    one = FileRead(Path("a"), 0, (Span(True, 0, 100),))
    for in_row, merged in ((True, 1), (False, 2)):
        assert len(_merged([one, FileRead(Path("a"), 104, (Span(in_row, 104, 204),))])) == merged
