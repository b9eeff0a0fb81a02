"""What a run asks of its caches, written down while it runs: a trace that replays to the run's own counters.

One `event` is what one layer is asked in one forward. A forward ends where the layers begin anew. One with more tokens
than the one before begins a request: a prompt after decoding.

Which token used which expert is kept where the graph still knows it. Grouped experts sort the pairs of a forward by
expert first; then they are dealt out to as many rows as there are tokens, which no counter can tell from the truth.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache.layer_cache import LayerCache
from ..errors import TraceError
from .trace import Trace

logger = logging.getLogger("moe_offload")

MAX_BYTES = 64 * 2**20  # of ids: some 85,000 tokens of 48 layers with 8 experts each


@dataclass(frozen=True)
class ForwardRecord:
    """One forward, all layers together. `began_s` counts from the beginning of the recording."""

    began_s: float
    tokens: int
    hits: int
    misses: int
    bytes_read: int
    stall_s: float


class Recorder:
    """Events of the layers whose caches these are. At `max_bytes` it stops recording, and says so once."""

    def __init__(self, caches: Sequence[LayerCache], top_k: Sequence[int], max_bytes: int = MAX_BYTES):
        self.caches, self.top_k, self.left = list(caches), list(top_k), max_bytes
        self.forwards: list[dict[int, NDArray[np.int16]]] = []  # {layer: ids [rows, k]} of each
        self.marks: list[tuple[float, int, int, int, float]] = []  # when a forward began: time and totals so far
        self.begun, self.last_layer = time.perf_counter(), len(self.caches)

    def event(self, layer: int, ids: Sequence[int], tokens: int) -> None:
        """`layer` is about to be asked for `ids`, the token-expert pairs of `tokens` tokens."""
        if self.left <= 0:
            return
        if layer <= self.last_layer or not self.forwards:
            self.marks.append(self._totals())
            self.forwards.append({})
        self.last_layer = layer
        rows = _rows(ids, tokens, self.top_k[layer])
        self.left -= rows.nbytes
        if self.left <= 0:  # a forward is recorded whole or not at all
            self.forwards.pop()
            logger.warning("the trace is full after %d forwards: what follows is not recorded", len(self.forwards))
            return
        self.forwards[-1][layer] = rows

    def trace(self, meta: Mapping[str, str] | None = None) -> Trace:
        """What has been recorded. Raises TraceError when that is nothing."""
        forwards = [forward for forward in self.forwards if any(len(rows) for rows in forward.values())]
        if not forwards:
            raise TraceError("nothing has been recorded: run the model between start_trace() and trace()")
        tokens = [max(map(len, forward.values())) for forward in forwards]
        begins = np.cumsum([0, *tokens])
        layers = len(self.caches)
        experts_TLK = np.full((int(begins[-1]), layers, max(self.top_k)), -1, dtype=np.int16)
        for begin, forward in zip(begins.tolist(), forwards, strict=False):
            for layer, rows in forward.items():
                experts_TLK[begin : begin + len(rows), layer, : rows.shape[1]] = rows
        requests = [i for i in range(len(forwards)) if i == 0 or tokens[i] > tokens[i - 1]]
        return Trace.of(
            experts_TLK,
            begins[requests],
            event_start=begins[:-1],
            num_experts=[cache.num_experts for cache in self.caches],
            meta=meta,
        )

    def steps(self) -> list[ForwardRecord]:
        """What each forward took, the last one up to now."""
        marks = [
            *self.marks[: len(self.forwards)],
            self.marks[len(self.forwards)] if self.left <= 0 else self._totals(),
        ]
        steps = []
        for forward, before, after in zip(self.forwards, marks, marks[1:], strict=False):
            hits, misses, nbytes, stall_s = (b - a for a, b in zip(before[1:], after[1:], strict=True))
            tokens = max((len(rows) for rows in forward.values()), default=0)
            steps.append(ForwardRecord(before[0], tokens, int(hits), int(misses), int(nbytes), float(stall_s)))
        return steps

    def passed_s(self) -> float:
        """From the beginning to now, or to where the trace was full."""
        return self.marks[len(self.forwards)][0] if self.left <= 0 else time.perf_counter() - self.begun

    def _totals(self) -> tuple[float, int, int, int, float]:
        counters = [cache.counters for cache in self.caches]
        return (
            time.perf_counter() - self.begun,
            sum(c.hits for c in counters),
            sum(c.misses for c in counters),
            sum(c.bytes_read for c in counters),
            sum(c.stall_s for c in counters),
        )


def _rows(ids: Sequence[int], tokens: int, top_k: int) -> NDArray[np.int16]:
    """`ids` as rows of distinct experts, one for each token; -1 where there are too few."""
    padded = np.full(tokens * top_k, -1, dtype=np.int16)
    padded[: len(ids)] = ids
    rows = padded.reshape(tokens, top_k)
    in_order = np.sort(rows, axis=1)
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        rows = np.sort(padded)[::-1].reshape(top_k, tokens).T  # the pairs of an expert are neighbours: in rows apart
    return np.ascontiguousarray(rows)
