"""The beginning of a KV cache of transformers as a cache of its own.

layer of the cache              its beginning
keys and values of all tokens   their first tokens: views, which cost nothing, since such layers grow by new tensors
of the last ones (a window)     the same, as long as nothing has left the window
sums of what was read           none: only all of it can be gone on from
nothing (shared, dummy)         nothing
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

KEYS = ("keys", "values")
GROWING, WINDOW, EMPTY = "DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"
CUTTABLE = {GROWING, WINDOW, EMPTY}


def lengths(cache: Any) -> set[int]:
    """How many tokens the layers have: one number, but for a cache whose last forward was interrupted."""
    return {layer.get_seq_length() for layer in cache.layers if _holds_keys(layer)}


def begin(cache: Any, tokens: int) -> Any | None:
    """A cache of the first `tokens` of `cache`, which stays as it is; None where it cannot be had."""
    layers = [_begin_layer(layer, tokens) for layer in cache.layers]
    if not layers or any(layer is None for layer in layers):
        return None
    found = copy.copy(cache)
    found.layers = layers
    return found


def nbytes(cache: Any) -> int:
    """The memory that `cache` keeps from being used otherwise, as far as it is known: a view keeps all it is of."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    held += [one for value in held if isinstance(value, dict) for one in value.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in held if isinstance(tensor, Tensor)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _begin_layer(layer: Any, tokens: int) -> Any | None:
    kind, found = type(layer).__name__, copy.copy(layer)
    if kind not in CUTTABLE:
        return None
    if not _holds_keys(layer):
        return found
    length, held = layer.get_seq_length(), layer.keys.shape[-2]
    if tokens > length or (tokens < length and held < length):
        return None
    if tokens < length:
        for name in KEYS:
            setattr(found, name, getattr(layer, name)[..., :tokens, :])
        if kind == WINDOW:
            found.cumulative_length = tokens
    return found


def _holds_keys(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), Tensor)
