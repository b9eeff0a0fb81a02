"""Uses of experts that code reads by a number, counted in a model that is not offloaded (`record_profile`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from ...experts import MoELayer
from .rows import put_rows


class _Resident:
    """A source of rows that are all in memory. A use is counted where the first of an expert's weights is read."""

    def __init__(self, moe: MoELayer, heard: Callable[[int, int], None]):
        self.name, self._heard = moe.name, heard
        self._experts = [moe.expert(e) for e in range(moe.num_experts)]
        self._first: dict[int, str] = {}  # {expert: the weight of it that was read first}

    def entered(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def take(self, expert: int, field: str, tokens: int) -> dict[str, Tensor]:
        if self._first.setdefault(expert, field) == field:
            self._heard(expert, tokens)
        return self._experts[expert]


@contextlib.contextmanager
def count_reads(moe: MoELayer, heard: Callable[[int, int], None]) -> Iterator[None]:
    """While it is entered, `heard` is told of each expert that is read, and for how many rows."""
    places = [place for places in moe.places for place in places]
    before = [place.module._parameters[place.attribute] for place in places]
    put_rows(moe, _Resident(moe, heard), places[0].tensor.device)
    try:
        yield
    finally:
        for place, param in zip(places, before, strict=True):
            place.module._parameters[place.attribute] = param
