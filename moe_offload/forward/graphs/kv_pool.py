"""Static KV caches that are used again: a step recorded as a CUDA graph runs only on the memory it was recorded on.

transformers makes a new static cache at each `generate`, elsewhere in memory, and each would be recorded anew. So the
layers of one that nobody holds any more are kept, and lent to the next of the same length.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import torch

SPARE = 2  # caches kept that nobody uses: each is as large as the context it was made for
SHORTEST = 256  # tokens
STEP = 1024  # tokens: what lengths beyond the planned context are rounded to


def bucket_tokens(tokens: int, planned_tokens: int) -> int:
    """The length of the cache for `tokens`: few different ones, and none beyond `planned_tokens` that need not be."""
    power = max(SHORTEST, 1 << (tokens - 1).bit_length())
    return min(power, planned_tokens if tokens <= planned_tokens else -(-tokens // STEP) * STEP)


class KVPool:
    """The spare caches of one model. Two `generate` at once are lent two."""

    def __init__(self) -> None:
        self._spare: list[tuple[Hashable, list[Any]]] = []
        self._lock = threading.RLock()  # a finalizer may run within any of the lines below

    def lend(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """An empty static cache, of layers used before where there are some of that `key`. `make` makes a new one."""
        cache = make()
        key = key, torch.is_inference_mode_enabled()  # what was made there cannot be written elsewhere
        with self._lock:
            kept = next((one for one in self._spare if one[0] == key), None)
            if kept is not None:
                self._spare.remove(kept)
        if kept is not None:
            cache.layers = kept[1]
            cache.reset()
        weakref.finalize(cache, self._take_back, key, cache.layers).atexit = False
        return cache

    def drop(self) -> None:
        """Free what nobody uses."""
        with self._lock:
            self._spare.clear()

    def _take_back(self, key: Hashable, layers: list[Any]) -> None:
        if not all(getattr(layer, "is_initialized", False) and not _is_held(layer) for layer in layers):
            return
        with self._lock:
            self._spare.insert(0, (key, layers))
            del self._spare[SPARE:]


def _is_held(layer: Any) -> bool:
    """Whether somebody else holds what was a cache's tensor, and so has one reference more than a tensor held by none.

    Both are counted in the same way: how many references a call itself takes depends on whether Dynamo is at work.
    """
    return sys.getrefcount(layer.keys) > sys.getrefcount(_HELD_BY_NONE.keys)


_HELD_BY_NONE = SimpleNamespace(keys=torch.empty(0))
