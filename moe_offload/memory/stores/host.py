"""The host store: rows in RAM. A load costs a copy, and the store as much RAM as its experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...errors import ClosedError
from ...experts import MoELayer
from ..buffers import map_pages
from ..finite import refuse_infinite
from .row_read import RowRead, check_request

#: What one thread copies at a time: long enough to be worth handing to it, short enough that several share one row.
PART_BYTES = 2 << 20


class HostStore:
    """`rows[layer]` is a contiguous uint8 tensor `[E, row_bytes]` on the CPU; `[0, row_bytes]` for a layer not held.

    `pinned` are the layers that a GPU can read by itself. `release` is called once, before the memory is given back.
    """

    def __init__(
        self,
        rows: Sequence[torch.Tensor],
        pinned: Collection[int] = (),
        release: Callable[[], None] = lambda: None,
    ):
        self.pinned, self._release = frozenset(pinned), release
        self._rows: list[torch.Tensor] | None = list(rows)
        self._counts = [layer.shape[0] for layer in rows]
        self._row_bytes = [layer.shape[1] for layer in rows]

    @property
    def files(self) -> list[Path]:
        return []

    @property
    def how(self) -> set[str]:
        return set()

    def begin(self, layer: int, expert: int, row: memoryview) -> RowRead:
        rows = self._rows  # a reader that got here before `close` keeps the memory until it is done
        if rows is None:
            raise ClosedError("this store was closed; its rows are gone. Offload the model again to go on")
        check_request(layer, expert, self._counts, row, self._row_bytes)
        source, target = rows[layer][expert].numpy(), np.frombuffer(row, np.uint8)
        nbytes = self._row_bytes[layer]
        pieces = [slice(at, at + PART_BYTES) for at in range(0, nbytes, PART_BYTES)]
        # numpy copies without the GIL, and in the calling thread alone: torch would wake its own threads.
        return RowRead([partial(np.copyto, target[p], source[p]) for p in pieces], lambda: nbytes)

    def read(self, layer: int, expert: int, row: memoryview) -> int:
        return self.begin(layer, expert, row).run()

    def rows_EN(self, layer: int) -> torch.Tensor:
        """The rows themselves, uint8 [E, row_bytes]: for a device that reads them without asking."""
        if self._rows is None:
            raise ClosedError("this store was closed; its rows are gone. Offload the model again to go on")
        return self._rows[layer]

    def close(self) -> None:
        if self._rows is not None:
            self._release()
        self._rows, self._release = None, lambda: None  # which may hold the rows, too


def pack_rows(moe: MoELayer, huge: bool = False, node: int | None = None) -> torch.Tensor:
    """The layer's rows `[E, row_bytes]`, uint8, on the CPU, from the model's own parameters. Padding is zero.

    `huge` and `node` are those of `map_pages`.
    """
    rows = map_pages(moe.nbytes, huge, node).view(moe.num_experts, -1).zero_()
    for e in range(moe.num_experts):
        pack_row(moe, e, rows[e])
    return rows


def pack_row(moe: MoELayer, e: int, row: torch.Tensor) -> None:
    """Write expert `e`'s fields into `row` [row_bytes], uint8; leaves padding as it is."""
    params = moe.expert(e)
    for field in moe.layout.fields:
        if field.name in params:
            span = row[field.offset : field.offset + field.nbytes]
            span.view(field.dtype).view(field.shape).copy_(params[field.name])
    if moe.must_be_finite:
        refuse_infinite(moe, e, row)
