"""Memory that holds rows: slots of a layer, scratch of a model.

Shapes: N elements of one row.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import torch
from torch import Tensor

from ..experts import ROW_ALIGN
from .numa import prefer_node

HUGE_PAGE = 2 << 20  # bytes
POISON = 0xFF  # every byte of a free slot in tests: NaN in each floating type we hold


class Rows:
    """A buffer of rows: seen by kernels as `bank_SN`, filled through `rows`, one byte view per row.

    On a CPU the views are memoryviews, which files are read into; on a device with memory of its own they are tensors.
    """

    def __init__(
        self,
        count: int,
        row_bytes: int,
        dtype: torch.dtype,
        poison: bool = False,
        raw: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        with torch.inference_mode(False):  # what is made within that mode cannot be written outside of it
            # Not initialised: the system gives memory out page by page, and a slot that was never filled takes none.
            self.bytes = allocate_unfilled(count * row_bytes, device).view(count, row_bytes) if raw is None else raw
            #: The same memory, which counts versions by itself: what is loaded through it is no change of a weight.
            self.unversioned = self.bytes.data
            if poison:
                self.unversioned.fill_(POISON)
            self.bank_SN = self.bytes.view(dtype)
            rows = self.bytes.unbind() if count else ()
            self.rows: list[Any] = [memoryview(row.numpy()) if row.device.type == "cpu" else row for row in rows]


def allocate_unfilled(nbytes: int, device: torch.device | str) -> Tensor:
    """Uninitialised bytes on `device`, which begin at a page on a CPU."""
    with torch.inference_mode(False):  # what is made within that mode cannot be written outside of it
        if torch.device(device).type == "cpu":
            return page_aligned(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def page_aligned(nbytes: int) -> Tensor:
    """Uninitialised bytes that begin at a page: what a read past the page cache needs."""
    raw = torch.empty(nbytes + ROW_ALIGN, dtype=torch.uint8, device="cpu")
    begin = -raw.data_ptr() % ROW_ALIGN
    return raw[begin : begin + nbytes]


def map_pages(nbytes: int, huge: bool = False, node: int | None = None) -> Tensor:
    """Uninitialised bytes that are a mapping of their own: whole pages, which go back to the system when nobody holds
    them any more. What a GPU registers is then the storage itself, so torch knows that it is pinned.

    `huge`: in pages of 2 MiB, where the system has them. A device reads them with fewer translations of addresses.
    `node`: from that NUMA node, while it has free ones.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    begin, extent = 0, -(-nbytes // ROW_ALIGN) * ROW_ALIGN
    huge = huge and hasattr(mmap, "MADV_HUGEPAGE") and extent >= HUGE_PAGE
    pages = mmap.mmap(-1, extent + (HUGE_PAGE if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        begin = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    rows = torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=begin)
    if node is not None:
        prefer_node(rows, node)
    return rows


#: The empty buffer that takes the place of one whose memory was given back. It is made at import because a model may be
#: garbage-collected while Dynamo traces, when torch is in a mode in which no real tensor can be made.
NOTHING = Rows(0, ROW_ALIGN, torch.uint8)
