"""`Stream`: the requests to one cache, event by event: a trace as one layer's cache sees it, or one cache of all
layers.

Shapes: N rows, K experts per row, V events, L layers, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...observe.trace import Event, Trace

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Event v asks for the experts in rows `first_V[v]` to `stop_V[v]` (not included) of `ids_NK`; -1 is none."""

    num_experts: int
    ids_NK: NDArray[np.int32]
    first_V: Ints
    stop_V: Ints
    tokens_V: Ints  # in a pooled stream those of a forward count once, with its first layer
    request_V: Ints

    def events(self) -> Iterator[Event]:
        for first, stop, tokens in zip(
            self.first_V.tolist(), self.stop_V.tolist(), self.tokens_V.tolist(), strict=True
        ):
            yield Event(Counter(e for e in self.ids_NK[first:stop].ravel().tolist() if e >= 0), tokens)

    def by_request(self) -> Iterator[Stream]:
        """Each request as a stream of its own."""
        bounds = np.flatnonzero(np.diff(self.request_V)) + 1
        for v in np.split(np.arange(len(self.first_V)), bounds):
            yield dataclasses.replace(
                self,
                first_V=self.first_V[v],
                stop_V=self.stop_V[v],
                tokens_V=self.tokens_V[v],
                request_V=self.request_V[v],
            )


def per_layer(trace: Trace) -> list[Stream]:
    """One stream a layer."""
    first_V, stop_V, request_V = _forwards(trace)
    streams = []
    for layer in range(trace.layers):
        ids_NK = np.ascontiguousarray(trace.experts_TLK[:, layer], dtype=np.int32)
        tokens_V = np.add.reduceat((ids_NK >= 0).any(axis=1), first_V, dtype=np.int64)
        asked = tokens_V > 0
        streams.append(
            Stream(trace.num_experts[layer], ids_NK, first_V[asked], stop_V[asked], tokens_V[asked], request_V[asked])
        )
    return streams


def pool_layers(trace: Trace) -> Stream:
    """All layers as one stream, in the order in which a forward asks them; each layer has ids of its own."""
    first_V, stop_V, request_V = _forwards(trace)
    forward_T = np.repeat(np.arange(len(first_V)), stop_V - first_V)
    offset_L = np.concatenate([[0], np.cumsum(trace.num_experts)])
    ids_TLK = np.where(trace.experts_TLK < 0, -1, trace.experts_TLK + offset_L[:-1, None]).astype(np.int32)
    layer_N = np.tile(np.arange(trace.layers), trace.tokens)
    forward_N = np.repeat(forward_T, trace.layers)
    order_N = np.lexsort((layer_N, forward_N))  # stable: tokens keep their order
    ids_NK = ids_TLK.reshape(-1, trace.top_k)[order_N]
    rows_V = np.repeat(stop_V - first_V, trace.layers)
    stop = np.cumsum(rows_V)
    first = stop - rows_V
    asking_V = np.add.reduceat((ids_NK >= 0).any(axis=1), first, dtype=np.int64)
    asked = asking_V > 0
    tokens_V = np.where(np.arange(len(first)) % trace.layers == 0, asking_V, 0)
    requests = np.repeat(request_V, trace.layers)
    return Stream(int(offset_L[-1]), ids_NK, first[asked], stop[asked], tokens_V[asked], requests[asked])


def _forwards(trace: Trace) -> tuple[Ints, Ints, Ints]:
    first_V = trace.event_start
    stop_V = np.append(first_V[1:], trace.tokens)
    return first_V, stop_V, np.searchsorted(trace.request_start, first_V, side="right") - 1
