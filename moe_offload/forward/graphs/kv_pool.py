"""Static KV caches that are used again: a step recorded as a CUDA graph runs only on the memory it was recorded on.

transformers makes a new static cache at each `generate`, elsewhere in memory, and each would be recorded anew. So the
layers of one that nobody holds any more are kept, and lent to the next of the same length. Those in
use and those kept hold twice the planned context at most, so that there may be one of each length: the plan counts it.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

MOST_MADE = 8  # caches, until the recordings of all of them are freed: those of a cache that is gone never run again
SHORTEST = 256  # tokens
STEP = 1024  # tokens: what lengths beyond the planned context are rounded to


def bucket_tokens(tokens: int, planned_tokens: int) -> int:
    """The length of the cache for `tokens`: few different ones, and none beyond `planned_tokens` that need not be."""
    power = max(SHORTEST, 1 << (tokens - 1).bit_length())
    return min(power, planned_tokens if tokens <= planned_tokens else -(-tokens // STEP) * STEP)


class Key(NamedTuple):
    """What a cache was made for. What was made in inference mode cannot be written outside of it."""

    sequences: int
    tokens: int
    inference: bool


class KVPool:
    """The caches of one model, of `most_tokens` in all if no more are in use. Two `generate` at once are lent two.

    `forget_recordings` frees those of all caches; it is called when so many have been made that most of them are gone.
    """

    def __init__(self, most_tokens: int, forget_recordings: Callable[[], None] = lambda: None) -> None:
        self.most_tokens, self._forget, self._made = most_tokens, forget_recordings, 0
        self._lent: dict[Key, set[int]] = {}  # caches in use, by number
        self._alive: set[int] = set()  # of them, those that a search for garbage has found in use
        self._numbers = itertools.count()
        self._spare: list[tuple[Key, list[Any]]] = []  # the last one used first
        self._lock = threading.RLock()  # a finalizer may run within any of the lines below

    def lend(self, sequences: int, tokens: int, make: Callable[[], Any]) -> Any:
        """An empty static cache, of layers used before where there are some of that size. `make` makes a new one."""
        cache = make()
        key = Key(sequences, tokens, torch.is_inference_mode_enabled())
        kept = self._take_spare(key)
        if kept is None and not self._alive.issuperset(self._lent.get(key, ())):
            # Perhaps to a cache that is gone, but in a cycle: to look for it takes no longer than recording anew.
            gc.collect()
            kept = self._take_spare(key)
            with self._lock:
                self._alive.update(*self._lent.values())
        number = next(self._numbers)
        with self._lock:
            self._lent.setdefault(key, set()).add(number)
            self._drop_oldest()
        if kept is not None:
            cache.layers = kept[1]
            cache.reset()
        else:
            self._made += 1
            if self._made > MOST_MADE:
                self._made = 1 + len(self._spare)
                self._forget()
        weakref.finalize(cache, self._take_back, key, number, cache.layers).atexit = False
        return cache

    def drop(self) -> None:
        """Free what nobody uses."""
        with self._lock:
            self._spare.clear()

    def _take_spare(self, key: Key) -> tuple[Key, list[Any]] | None:
        with self._lock:
            kept = next((one for one in self._spare if one[0] == key), None)
            if kept is not None:
                self._spare.remove(kept)
            return kept

    def _take_back(self, key: Key, number: int, layers: list[Any]) -> None:
        with self._lock:
            self._lent[key].discard(number)
            self._alive.discard(number)
            if all(getattr(layer, "is_initialized", False) and not _is_held(layer) for layer in layers):
                self._spare.insert(0, (key, layers))
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Drop what was used longest ago, until there is no more than there may be."""
        room = self.most_tokens - sum(key.sequences * key.tokens * len(lent) for key, lent in self._lent.items())
        for i, (key, _) in enumerate(self._spare):
            room -= key.sequences * key.tokens
            if room < 0:
                del self._spare[i:]
                break


def _is_held(layer: Any) -> bool:
    """Whether somebody else holds what was a cache's tensor, and so has one reference more than a tensor held by none.

    Both are counted in the same way: how many references a call itself takes depends on whether Dynamo is at work.
    """
    return sys.getrefcount(layer.keys) > sys.getrefcount(_HELD_BY_NONE.keys)


_HELD_BY_NONE = SimpleNamespace(keys=torch.empty(0, device="cpu"))
