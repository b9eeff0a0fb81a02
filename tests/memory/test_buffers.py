"""Memory for rows: mappings of their own, which torch knows by their first byte, and which go back whole."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from moe_offload.experts import ROW_ALIGN
from moe_offload.memory.buffers import HUGE_PAGE, map_pages

MAPS = Path("/proc/self/smaps")


def mapped_at(address):
    """The lines of /proc about the mapping that begins at, or before, `address`; None where there is none."""
    found = None
    with MAPS.open() as maps:
        for line in maps:
            head = line.split(" ", 1)[0]
            if "-" in head and not head.endswith(":"):
                begin, end = (int(x, 16) for x in head.split("-"))
                if found:
                    return found
                found = [line] if begin <= address < end else None
            elif found:
                found.append(line)
    return found


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("nbytes", [0, 1, ROW_ALIGN, 3 * HUGE_PAGE + ROW_ALIGN])
def test_the_storage_begins_where_the_rows_do(nbytes, huge):
    """What is registered with CUDA is found by the first byte of the storage: `is_pinned` asks for that."""
    rows = map_pages(nbytes, huge)
    assert rows.numel() == nbytes and rows.untyped_storage().data_ptr() == rows.data_ptr()
    assert rows.data_ptr() % (HUGE_PAGE if huge and nbytes >= HUGE_PAGE else ROW_ALIGN) == 0
    rows.fill_(7)
    assert bool((rows == 7).all())


def test_memory_goes_back_when_the_last_view_is_gone():
    nbytes = 64 * HUGE_PAGE
    view = map_pages(nbytes).view(-1, ROW_ALIGN)[3:5]
    gc.collect()
    address = view.data_ptr()
    view.fill_(1)
    assert mapped_at(address)
    del view
    assert mapped_at(address) is None


def test_large_rows_are_in_large_pages_only_where_it_is_asked_for():
    flags = []
    for huge in (False, True):
        rows = map_pages(4 * HUGE_PAGE, huge)
        flags.append(next(line for line in mapped_at(rows.data_ptr()) if line.startswith("VmFlags")))
    assert " hg" not in flags[0] and " hg" in flags[1]


def test_memory_is_private_to_a_forked_process():
    rows = map_pages(ROW_ALIGN)
    assert mapped_at(rows.data_ptr())[0].split()[1] == "rw-p"
    assert isinstance(rows, torch.Tensor)
