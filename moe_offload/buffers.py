"""Memory that holds rows: slots of a layer, scratch of a model.

Shapes: N elements of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import ROW_ALIGN

POISON = 0xFF  # every byte of a free slot in tests: NaN in each floating type we hold


class Rows:
    """A buffer of rows: seen by kernels as `bank_SN`, filled through one byte view per row."""

    def __init__(self, count: int, row_bytes: int, dtype: torch.dtype, poison: bool = False, raw: Tensor | None = None):
        # Not initialised: memory that no row has been loaded into is never touched, and never counts.
        self.bytes = page_aligned(count * row_bytes).view(count, row_bytes) if raw is None else raw
        if poison:
            self.bytes.fill_(POISON)
        self.bank_SN = self.bytes.view(dtype)
        self.rows = [memoryview(self.bytes[i].numpy()) for i in range(count)]


def page_aligned(nbytes: int) -> Tensor:
    """Uninitialised bytes that begin at a page: what a read past the page cache needs."""
    raw = torch.empty(nbytes + ROW_ALIGN, dtype=torch.uint8)
    begin = -raw.data_ptr() % ROW_ALIGN
    return raw[begin : begin + nbytes]


#: What is left when memory was given back. Made beforehand: a model may be collected in the middle of a trace, under a
#: mode in which no real tensor can be made.
NOTHING = Rows(0, ROW_ALIGN, torch.uint8)
