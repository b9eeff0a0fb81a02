"""The scratch rows that all layers of a model share, and what is read into them ahead of any request.

Prefill streams the rows that have no slot through scratch. Where a layer has no more use for a scratch row, a row that
the next layer will probably ask for is read into it: in the background, so that it never delays a demand, and without
evicting anything. The next event of that layer claims what it needs; the rest was read and not used, which is counted.
Only one layer at a time has rows ahead: an event of any other layer drops them.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

from ..experts import RowLayout
from .buffers import NOTHING, POISON, Rows
from .stores import Store
from .transfer import Ticket, Transfer


@dataclass(frozen=True)
class Held:
    """A row that was read ahead into row `scratch_row` of scratch, or is on its way there."""

    scratch_row: int
    ticket: Ticket


class Scratch:
    """The scratch memory of a model: `raw` bytes, seen as rows of the layout of whichever layer uses them."""

    def __init__(self, raw: Tensor, transfer: Transfer, poison: bool = False):
        self.raw, self.transfer, self.poison = raw, transfer, poison
        self._seen_as: dict[tuple[int, torch.dtype], Rows] = {}
        self._layer = -1  # the layer whose rows are being read ahead; -1 for none
        self.ahead: dict[int, Held] = {}  # by expert; empty where nothing is read ahead
        self._wasted: Callable[[int], None] = lambda nbytes: None

    def rows(self, layout: RowLayout) -> Rows:
        key = (layout.row_bytes, layout.dtype)
        if key not in self._seen_as:
            own = self.raw[: self.raw.numel() // layout.row_bytes * layout.row_bytes].view(-1, layout.row_bytes)
            self._seen_as[key] = Rows(len(own), layout.row_bytes, layout.dtype, raw=own)
        return self._seen_as[key]

    def read_ahead(
        self, layer: int, store: Store, layout: RowLayout, expert: int, scratch_row: int, wasted: Callable[[int], None]
    ) -> None:
        """Begin to read `expert` of `layer` into row `scratch_row` of scratch, which nobody uses.

        `wasted` is told the bytes if nobody claims it.
        """
        if layer != self._layer:
            self.drop()
            self._layer, self._wasted = layer, wasted
        rows = self.rows(layout)
        if self.poison:
            rows.unversioned[scratch_row].fill_(POISON)
        self.ahead[expert] = Held(
            scratch_row, self.transfer.start(store, layer, expert, rows.rows[scratch_row], demanded=False)
        )

    def claim(self, layer: int, used: Container[int]) -> dict[int, Held]:
        """What was read ahead for `layer` and is `used`, now demanded. All else that was read ahead is dropped."""
        if not self.ahead:
            return {}
        claimed = {}
        if layer == self._layer:
            claimed = {e: self.ahead.pop(e) for e in list(self.ahead) if e in used}
        self.drop()
        for held in claimed.values():
            self.transfer.hurry(held.ticket)
        return claimed

    def release(self) -> None:
        """Give the memory back. Nothing may be on its way any more."""
        self.raw, self.ahead = NOTHING.bytes, {}
        self._seen_as.clear()

    def drop(self) -> None:
        """Give up what is ahead; when this returns nothing writes into scratch any more."""
        tickets = [held.ticket for held in self.ahead.values()]
        self._layer = -1  # `ahead` keeps the rows until their reads have ended, as Ctrl-C may interrupt `cancel`
        self.transfer.cancel(tickets)
        self.ahead = {}
        for ticket in tickets:
            self._wasted(ticket.moved)
