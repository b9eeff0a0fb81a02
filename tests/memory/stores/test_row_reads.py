"""The parts of a row are read in any order, and at once: none may write where another does."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_offload.checkpoint.headers import TensorRange
from moe_offload.checkpoint.row_index import Piece, RowIndex
from moe_offload.experts import RowLayout
from moe_offload.files.file_stamp import FileStamp
from moe_offload.memory.buffers import page_aligned
from moe_offload.memory.stores.disk import DiskStore
from moe_offload.memory.stores.row_reads import PAGE

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
