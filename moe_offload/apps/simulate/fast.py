"""The built-in policies and the slot table once more, compiled: the same hits as `plain`, to the last one.

Shapes: N rows, K experts per row, V events, E experts, S slots.

This file follows `cache/layer_cache.py` and the policies line by line, floating point included: among equals the first
in the order of slots gives way. Tests compare both on random traces and on a real one. It needs numba; without it
`plain` is used.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from ...cache import decay as rate
from ...cache import lrfu_classes as classes
from ...cache import successors as s
from ...cache import tiny_lfu as tiny
from .stream import Stream

KINDS = ["lru", "lfu", "decayed_lfu", "lrfu_classes", "tiny_lfu", "successors"]
LRU, LFU, DECAYED, CLASSES, TINY, SUCCESSORS = range(len(KINDS))
Ints = NDArray[np.int64]

#: Arguments, not globals: compiled code is kept on disk, and would not notice when a policy's file changes.
CONSTANTS = (
    *(s.FAST, s.SLOW, rate.Rate(0, s.FAST).share, rate.Rate(0, s.SLOW).share, s.WEIGHT, rate.FULL, rate.MOST),
    *(s.HORIZON, s.FADE, s.DOUBT, s.SHORTLIST, s.LARGEST_CONTEXT),
    *(classes.CLASSES, classes.HALF_LIFE, tiny.SAMPLE),
)


def replay_fast(stream: Stream, slots: int, kind: str, half_life: float) -> tuple[Ints, Ints]:
    """`asked_V`, `hits_V`: how many distinct experts each event asks for, and how many of them are resident."""
    where = (stream.ids_NK, stream.first_V, stream.stop_V, stream.tokens_V, stream.num_experts)
    return _replay(*where, slots, KINDS.index(kind), half_life, CONSTANTS)  # type: ignore[no-any-return]


@numba.njit(cache=True, nogil=True)
def _replay(ids_NK, first_V, stop_V, tokens_V, num_experts, slots, kind, half_life, constants):  # type: ignore[no-untyped-def]
    FAST, SLOW, SHARE_F, SHARE_S, WEIGHT, FULL, MOST = constants[:7]
    HORIZON, FADE, DOUBT, SHORTLIST, LARGEST, N_CLASSES, CLASS_HALF_LIFE, SAMPLE = constants[7:]
    V, K = len(first_V), ids_NK.shape[1]
    asked_V, hits_V = np.zeros(V, np.int64), np.zeros(V, np.int64)
    slot_of, expert_at = np.full(num_experts, -1), np.full(slots, -1)
    free, n_free = np.arange(slots - 1, -1, -1), slots
    count, event = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.int64)
    candidates, streamed = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.bool_)
    given_up = np.zeros(slots, np.int64)
    key1, key2 = np.zeros(num_experts), np.zeros(num_experts)  # the smallest leaves first
    rank1, rank2 = np.zeros(num_experts), np.zeros(num_experts)
    now, seen, unit = 0.0, 0, 1.0
    tables = num_experts if kind == SUCCESSORS else 1
    fast, slow, unit_f, unit_s = np.zeros(num_experts), np.zeros(num_experts), 1.0, 1.0
    by, followed = np.zeros((tables, tables), np.uint8), np.zeros(tables, np.int64)
    recent, n_recent = np.zeros((HORIZON, LARGEST), np.int64), np.zeros(HORIZON, np.int64)
    turn = 0

    if kind == LRU:
        key1[:] = -1.0
    elif kind == CLASSES:
        key2[:] = -np.inf  # the last use
        half_life = CLASS_HALF_LIFE
    elif kind == LFU or kind == TINY:
        key2[:] = -1.0

    for v in range(V):
        # The distinct experts, ascending, and how often each is used.
        n, pairs, tokens = 0, 0, tokens_V[v]
        for row in range(first_V[v], stop_V[v]):
            for k in range(K):
                e = ids_NK[row, k]
                if e >= 0:
                    if count[e] == 0:
                        event[n] = e
                        n += 1
                    count[e] += 1
                    pairs += 1
        asked_V[v] = n
        event[:n].sort()

        # policy.access
        if kind == LRU:
            now += 1.0
            for i in range(n):
                key1[event[i]] = now + 1.0 - 1.0 / count[event[i]]
        elif kind == LFU:
            now += 1.0
            for i in range(n):
                key1[event[i]] += count[event[i]]
                key2[event[i]] = now
        elif kind == DECAYED or kind == CLASSES:
            unit *= 2.0 ** min(tokens / half_life, MOST)
            weight = unit * _mean_decay(tokens, half_life)
            for i in range(n):
                key1[event[i]] += weight * count[event[i]]
            if unit > FULL:
                key1 /= unit
                unit = 1.0
            if kind == CLASSES:
                seen += tokens
                for i in range(n):
                    key2[event[i]] = seen
        elif kind == TINY:
            now += 1.0
            for i in range(n):
                key1[event[i]] += count[event[i]]
                key2[event[i]] = now
            seen += pairs
            while seen >= SAMPLE * num_experts:
                key1 /= 2.0
                seen //= 2
        elif kind == SUCCESSORS:
            unit_f *= 2.0 ** min(tokens / FAST, MOST)
            unit_s *= 2.0 ** min(tokens / SLOW, MOST)
            weight_f = unit_f * _mean_decay(tokens, FAST)
            weight_s = unit_s * _mean_decay(tokens, SLOW)
            for i in range(n):
                fast[event[i]] += weight_f * count[event[i]]
                slow[event[i]] += weight_s * count[event[i]]
            if unit_f > FULL:
                fast /= unit_f
                unit_f = 1.0
            if unit_s > FULL:
                slow /= unit_s
                unit_s = 1.0
            if n > LARGEST:
                n_recent[:] = 0
            else:
                turn = (turn + 1) % HORIZON
                for j in range(n_recent[turn]):
                    f = recent[turn, j]
                    for i in range(n):
                        by[f, event[i]] += 1
                    followed[f] += 1
                    if followed[f] == FADE:
                        followed[f] >>= 1
                        for e in range(num_experts):
                            by[f, e] >>= 1
                for h in range(HORIZON - 1, 0, -1):
                    recent[h] = recent[h - 1]
                    n_recent[h] = n_recent[h - 1]
                recent[0, :n] = event[:n]
                n_recent[0] = n

        # cache.lookup, or cache.fill where the pairs outnumber the slots
        missing = 0
        for i in range(n):
            missing += slot_of[event[i]] < 0
        hits_V[v] = n - missing
        n_victims, n_given_up = missing - n_free, 0
        if missing and pairs > slots:
            _most_used_first(event, count, n)
        if n_victims > 0:
            n_candidates = 0
            if pairs > slots:
                for i in range(n - 1, -1, -1):
                    if slot_of[event[i]] < 0:
                        candidates[n_candidates] = event[i]
                        n_candidates += 1
            for slot in range(slots):
                e = expert_at[slot]
                if e >= 0 and count[e] == 0:
                    candidates[n_candidates] = e
                    n_candidates += 1
            for c in range(n_candidates):  # policy.victims
                e = candidates[c]
                if kind == CLASSES:
                    score = key1[e] / unit
                    cls = min(max(math.floor(math.log2(score)), 0), N_CLASSES - 1) if score > 0 else 0
                    rank1[c], rank2[c] = (key2[e] - seen) / 2.0**cls, key1[e]
                elif kind == SUCCESSORS:
                    rank1[c] = slow[e]
                else:
                    rank1[c], rank2[c] = key1[e], key2[e]
            if kind == SUCCESSORS:
                n_candidates = _smallest(candidates, rank1, rank2, n_candidates, max(n_victims, SHORTLIST))
                for c in range(n_candidates):
                    e = candidates[c]
                    rank1[c] = SHARE_F / unit_f * fast[e] + SHARE_S / unit_s * slow[e]
                if n_recent[0] and n_candidates > 1:
                    weight = WEIGHT / n_recent[0]
                    for j in range(n_recent[0]):
                        f = recent[0, j]
                        w = weight / (followed[f] + DOUBT)
                        for c in range(n_candidates):
                            rank1[c] += w * by[f, candidates[c]]
            _smallest(candidates, rank1, rank2, n_candidates, n_victims)
            for c in range(n_victims):
                e = candidates[c]
                if slot_of[e] < 0:
                    streamed[e] = True
                else:
                    given_up[n_given_up] = slot_of[e]
                    n_given_up += 1
                    slot_of[e] = -1
        taken = 0
        for i in range(n):
            e = event[i]
            if slot_of[e] < 0 and not streamed[e]:
                if n_free:
                    n_free -= 1
                    slot = free[n_free]
                else:
                    slot = given_up[taken]
                    taken += 1
                slot_of[e], expert_at[slot] = slot, e
            streamed[e] = False
            count[e] = 0
    return asked_V, hits_V


@numba.njit(cache=True, nogil=True)
def _mean_decay(tokens, half_life):  # type: ignore[no-untyped-def]
    if tokens <= 1:
        return 1.0
    one = -math.expm1(-math.log(2.0) / half_life)
    return -math.expm1(-math.log(2.0) * tokens / half_life) / (tokens * one)


@numba.njit(cache=True, nogil=True)
def _smallest(items, rank1, rank2, n, wanted):  # type: ignore[no-untyped-def]
    """Move the `wanted` smallest to the front, ascending, equal ones in their order; return how many there are."""
    wanted = min(wanted, n)
    for m in range(wanted):
        best = m
        for c in range(m + 1, n):
            if rank1[c] < rank1[best] or (rank1[c] == rank1[best] and rank2[c] < rank2[best]):
                best = c
        item, r1, r2 = items[best], rank1[best], rank2[best]
        for c in range(best, m, -1):
            items[c], rank1[c], rank2[c] = items[c - 1], rank1[c - 1], rank2[c - 1]
        items[m], rank1[m], rank2[m] = item, r1, r2
    return wanted


@numba.njit(cache=True, nogil=True)
def _most_used_first(event, count, n):  # type: ignore[no-untyped-def]
    """A stable sort, as `Counter.most_common` has it."""
    for i in range(1, n):
        e, j = event[i], i
        while j > 0 and count[event[j - 1]] < count[e]:
            event[j] = event[j - 1]
            j -= 1
        event[j] = e
