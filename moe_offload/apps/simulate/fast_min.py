"""When each expert is needed next, and Belady's MIN with bypass: compiled, the same hits as `..belady` counts.

Shapes: N rows, K experts per row, V events, E experts.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from .stream import Stream

Ints = NDArray[np.int64]
NEVER = 1 << 62


def replay_bypass(stream: Stream, slots: int) -> tuple[Ints, Ints]:
    """The same of MIN with bypass: of the residents and the event's experts, those needed soonest stay."""
    return _bypass(stream.ids_NK, stream.first_V, stream.stop_V, stream.num_experts, slots)  # type: ignore[no-any-return]


@numba.njit(cache=True, nogil=True)
def next_uses(ids_NK, first_V, stop_V, num_experts):  # type: ignore[no-untyped-def]
    """[V, most distinct experts]: for each event and its experts in order of first use, the next event with it."""
    V, K = len(first_V), ids_NK.shape[1]
    widest, distinct = 0, np.zeros(V, np.int64)
    last = np.full(num_experts, -1)
    for v in range(V):
        for row in range(first_V[v], stop_V[v]):
            for k in range(K):
                e = ids_NK[row, k]
                if e >= 0 and last[e] != v:
                    last[e] = v
                    distinct[v] += 1
        widest = max(widest, distinct[v])
    upcoming = np.full((V, widest), NEVER)
    following = np.full(num_experts, NEVER)
    last[:] = -1
    for v in range(V - 1, -1, -1):
        i = 0
        for row in range(first_V[v], stop_V[v]):
            for k in range(K):
                e = ids_NK[row, k]
                if e >= 0 and last[e] != v:
                    last[e] = v
                    upcoming[v, i] = following[e]
                    following[e] = v
                    i += 1
    return upcoming


@numba.njit(cache=True, nogil=True)
def _bypass(ids_NK, first_V, stop_V, num_experts, slots):  # type: ignore[no-untyped-def]
    V, K = len(first_V), ids_NK.shape[1]
    asked_V, hits_V = np.zeros(V, np.int64), np.zeros(V, np.int64)
    upcoming = next_uses(ids_NK, first_V, stop_V, num_experts)
    position = np.full(num_experts, -1)  # in `resident`
    resident, n_resident = np.zeros(slots + num_experts, np.int64), 0
    next_use, last = np.zeros(num_experts, np.int64), np.full(num_experts, -1)
    for v in range(V):
        i, new = 0, n_resident
        for row in range(first_V[v], stop_V[v]):
            for k in range(K):
                e = ids_NK[row, k]
                if e >= 0 and last[e] != v:
                    last[e] = v
                    next_use[e] = upcoming[v, i]
                    i += 1
                    if position[e] >= 0:
                        hits_V[v] += 1
                    else:
                        position[e] = new
                        resident[new] = e
                        new += 1
        asked_V[v] = i
        while new > slots:
            worst = 0
            for j in range(1, new):
                if next_use[resident[j]] > next_use[resident[worst]]:
                    worst = j
            position[resident[worst]] = -1
            new -= 1
            if worst < new:
                resident[worst] = resident[new]
                position[resident[worst]] = worst
        n_resident = new
    return asked_V, hits_V
