"""What a run asks of its caches, written down while it runs: a trace that replays to the run's own counters.

One `event` is what one layer is asked in one forward. A forward ends where the layers begin anew. A prompt after
decoding begins a request; where nobody says what a forward is, one with more tokens than the one before does.

Which token used which expert is kept where the graph still knows it. Grouped experts sort the pairs of a forward by
expert first; then they are dealt out to as many rows as there are tokens, which no counter can tell from the truth.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...cache.counters import Counters
from ...cache.layer_cache import LayerCache
from ...cache.phase import is_decode
from ...errors import TraceError
from ..progress import compiled_s
from . import Trace

logger = logging.getLogger("moe_offload")

Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
MAX_BYTES = 64 * 2**20  # of ids: some 85,000 tokens of 48 layers with 8 experts each


@dataclass(kw_only=True)
class ForwardRecord(Counters):
    """One forward, all layers together: what was counted while it ran, and when that was.

    Args:
        began_s, ended_s: Seconds since the beginning of the recording: the call of the model, and its result.
        compile_s: Seconds of that time in which graphs were compiled.
        decode: Whether it added one token to each sequence (`phase.is_decode`).
    """

    began_s: Seconds
    ended_s: Seconds
    compile_s: Seconds
    decode: bool


class _Mark(NamedTuple):
    """Where a forward begins: the time, and what has been counted and compiled so far."""

    at_s: float
    counted: Counters
    compiled_s: float
    decode: bool | None  # None where nobody has said


class TraceRecorder:
    """Events of the layers whose caches these are. At `max_bytes` it stops recording, and says so once."""

    def __init__(self, caches: Sequence[LayerCache], top_k: Sequence[int], max_bytes: int = MAX_BYTES):
        self.caches, self.top_k, self.left = list(caches), list(top_k), max_bytes
        self.ids: list[dict[int, NDArray[np.int16]]] = []  # {layer: ids [rows, k]} of each forward
        self.marks: list[_Mark] = []  # where each forward began
        self.ends: dict[int, float] = {}  # {forward: when it ended}, where that was said
        self.begun, self.last_layer = time.perf_counter(), len(self.caches)
        self._called: _Mark | None = None

    def begin_forward(self, decode: bool) -> None:
        """The model has been called. Where nobody says so, a forward begins with its first event."""
        if self.left > 0:
            self._called, self.last_layer = self._mark(decode), len(self.caches)

    def end_forward(self) -> None:
        """The model has returned, or failed."""
        if self._called is None and self.ids:
            self.ends.setdefault(len(self.ids) - 1, time.perf_counter() - self.begun)
        self._called = None

    def event(self, layer: int, ids: Sequence[int], tokens: int) -> None:
        """`layer` is about to be asked for `ids`, the token-expert pairs of `tokens` tokens."""
        if self.left <= 0:
            return
        if layer <= self.last_layer or not self.ids:
            self.marks.append(self._called or self._mark(None))
            self.ids.append({})
            self._called = None
        self.last_layer = layer
        rows = _rows(ids, tokens, self.top_k[layer])
        self.left -= rows.nbytes
        if self.left <= 0:  # a forward is recorded whole or not at all
            self.ids.pop()
            logger.warning("the trace is full after %d forwards: what follows is not recorded", len(self.ids))
            return
        self.ids[-1][layer] = rows

    def trace(self, meta: Mapping[str, str] | None = None) -> Trace:
        """What has been recorded. Raises TraceError when that is nothing."""
        found = [i for i, forward in enumerate(self.ids) if any(len(rows) for rows in forward.values())]
        forwards, decodes = [self.ids[i] for i in found], [bool(self.marks[i].decode) for i in found]
        if not forwards:
            raise TraceError("nothing has been recorded: run the model between start_trace() and trace()")
        tokens = [max(map(len, forward.values())) for forward in forwards]
        begins = np.cumsum([0, *tokens])
        layers = len(self.caches)
        experts_TLK = np.full((int(begins[-1]), layers, max(self.top_k)), -1, dtype=np.int16)
        for begin, forward in zip(begins.tolist(), forwards, strict=False):
            for layer, rows in forward.items():
                experts_TLK[begin : begin + len(rows), layer, : rows.shape[1]] = rows
        requests = [
            i
            for i in range(len(forwards))
            if i == 0 or tokens[i] > tokens[i - 1] or (decodes[i - 1] and not decodes[i])
        ]
        return Trace.of(
            experts_TLK,
            begins[requests],
            event_start=begins[:-1],
            num_experts=[cache.num_experts for cache in self.caches],
            meta=meta,
        )

    def forwards(self) -> list[ForwardRecord]:
        """What each forward took, the last one up to now."""
        marks = [*self.marks[: len(self.ids)], self._end()]
        found: list[ForwardRecord] = []
        for i, (ids, begin, end) in enumerate(zip(self.ids, marks, marks[1:], strict=False)):
            tokens = max((len(rows) for rows in ids.values()), default=0)
            said = is_decode(tokens) if begin.decode is None else begin.decode
            counted = {**(end.counted - begin.counted).values(), "tokens": tokens}
            found.append(
                ForwardRecord(
                    **{**counted, "stall_s": max(counted["stall_s"], 0.0)},  # a sum of floats taken from another
                    began_s=begin.at_s,
                    ended_s=self.ends.get(i, end.at_s),
                    compile_s=end.compiled_s - begin.compiled_s,
                    decode=said,
                )
            )
        return found

    def passed_s(self) -> float:
        """From the beginning to now, or to where the trace was full."""
        return self._end().at_s

    def _end(self) -> _Mark:
        return self.marks[len(self.ids)] if self.left <= 0 else self._mark(None)

    def _mark(self, decode: bool | None) -> _Mark:
        counted = Counters.total(cache.counters for cache in self.caches)
        return _Mark(time.perf_counter() - self.begun, counted, compiled_s(), decode)


def _rows(ids: Sequence[int], tokens: int, top_k: int) -> NDArray[np.int16]:
    """`ids` as rows of distinct experts, one for each token; -1 where there are too few."""
    padded = np.full(tokens * top_k, -1, dtype=np.int16)
    padded[: len(ids)] = ids
    rows = padded.reshape(tokens, top_k)
    in_order = np.sort(rows, axis=1)
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        rows = np.sort(padded)[::-1].reshape(top_k, tokens).T  # the pairs of an expert are neighbours: in rows apart
    return np.ascontiguousarray(rows)
