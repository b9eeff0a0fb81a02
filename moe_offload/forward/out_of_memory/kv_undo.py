"""Undo what a forward that failed half way has written to the KV cache it was given, where the undo is certain to be
right.

    cache layer                     a forward                                        taken back by
    never used                      fills it                                         what it was made of
    DynamicLayer                    puts longer tensors in place of its own          cutting them
    DynamicSlidingWindowLayer       likewise, and forgets what is out of its window  cutting, where nothing is forgotten
    StaticLayer                     writes behind what is there, and counts          counting back: it is written again
    StaticSlidingWindowLayer        likewise until it is full, then moves all        counting back, until then
    a layer that holds nothing      nothing                                          nothing

All other layers (recurrent states, quantised ones, a model's own), caches that move between devices, and arguments that
may hold state of their own are not restored: `remember_caches` returns None. A compiled forward sets the attributes of
a cache only after all its tensors have been computed, and an eager one in between; each layer is looked at by itself.
Lengths are in tokens; those of a static cache are tensors of the device, and nothing waits for them before a forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Restores one layer, after the forward has failed; False where it cannot, and then the cache is not to be used.
Undo = Callable[[], bool]
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
LENGTH, WINDOW = "cumulative_length", "_sliding_window_tensor"  # tensors of one element that an unused layer may have


def remember_caches(arguments: Iterable[Any], tokens: int) -> Undo | None:
    """Before a forward of so many `tokens` a sequence: what takes back what it does to its arguments, or None where
    that is not known."""
    caches, seen = [], list(arguments)
    while seen:
        one = seen.pop()
        if isinstance(one, (list, tuple)):
            seen += one
        elif isinstance(one, Mapping):
            seen += one.values()
        elif hasattr(one, "layers") and type(one).__module__ == "transformers.cache_utils":
            caches.append(one)
        elif not isinstance(one, (Tensor, *PLAIN)):
            return None
    undos = [_undo_of_cache(cache, tokens) for cache in caches]
    known = [undo for undo in undos if undo is not None]
    return (lambda: _undo_each(known)) if len(known) == len(undos) else None


def _undo_each(undos: Iterable[Undo]) -> bool:
    results = [undo() for undo in undos]  # each of them: none is left half put back
    return all(results)


def _undo_of_cache(cache: Any, tokens: int) -> Undo | None:
    from transformers import cache_utils

    if getattr(cache, "offloading", True):
        return None
    layers, undos, static = list(cache.layers), [], []
    for layer in layers:
        kind, held = type(layer), getattr(layer, "keys", None)
        if held is None:
            undo = _undo_of_unused(layer)
        elif kind is cache_utils.StaticLayer and isinstance(layer.cumulative_length, Tensor):
            static.append(layer)
            continue
        elif kind is cache_utils.DynamicLayer:
            undo = _undo_of_dynamic(layer, ("keys", "values"), tokens)
        elif kind is cache_utils.DynamicSlidingWindowLayer:
            undo = _undo_of_sliding(layer, tokens)
        elif kind is cache_utils.StaticSlidingWindowLayer:
            undo = _undo_of_static_sliding(layer, tokens)
        else:
            undo = None
        if undo is None:
            return None
        undos.append(undo)
    if static:
        undos.append(_undo_of_static(static, tokens))

    def undo_all() -> bool:
        del cache.layers[len(layers) :]  # a cache without a configuration gets its layers as they are asked for
        return _undo_each(undos)

    return undo_all


def _undo_of_unused(layer: Any) -> Undo | None:
    before = {name: dict(value) if type(value) is dict else value for name, value in vars(layer).items()}
    inside = [x for value in before.values() for x in (value.values() if isinstance(value, dict) else [value])]
    tensors = [x for x in inside if isinstance(x, Tensor)]
    if not all(isinstance(x, (Tensor, *PLAIN)) for x in inside) or any(
        x is not before.get(LENGTH) and x is not before.get(WINDOW) for x in tensors
    ):
        return None

    def undo() -> bool:
        vars(layer).clear()
        vars(layer).update(before)
        counted = before.get(LENGTH)
        if isinstance(counted, Tensor):
            counted.zero_()
        return True

    return undo


def _undo_of_dynamic(layer: Any, names: tuple[str, ...], tokens: int) -> Undo:
    lengths = {name: getattr(layer, name).shape[-2] for name in names}

    def undo() -> bool:
        for name, length in lengths.items():
            tensor = getattr(layer, name)
            if tensor.shape[-2] == length + tokens:
                setattr(layer, name, tensor[..., :length, :].contiguous())
            elif tensor.shape[-2] != length:
                return False
        return True

    return undo


def _undo_of_sliding(layer: Any, tokens: int) -> Undo:
    """A window that is full keeps its length when it moves: only the very same tensors are what they were."""
    length, cut = (
        layer.cumulative_length,
        {name: _undo_of_dynamic(layer, (name,), tokens) for name in ("keys", "values")},
    )
    same = {name: weakref.ref(getattr(layer, name)) for name in cut}
    lengths = {name: getattr(layer, name).shape[-2] for name in cut}

    def undo() -> bool:
        for name in cut:
            tensor = getattr(layer, name)
            if same[name]() is tensor:
                continue
            if tensor.shape[-2] != lengths[name] + tokens or not cut[name]():
                return False
        if layer.cumulative_length not in (length, length + tokens):
            return False
        layer.cumulative_length = length
        return True

    return undo


def _undo_of_static(layers: list[Any], tokens: int) -> Undo:
    """Between forwards all layers of a cache are as long, so one is remembered at each step. Where another turns out
    not to be, the cache had been left half written before."""
    before = layers[0].cumulative_length.clone()

    def undo() -> bool:
        if any(layer.cumulative_length.device != before.device for layer in layers):
            return False
        grown_L = torch.stack([layer.cumulative_length for layer in layers]) - before
        if not ((grown_L == 0) | (grown_L == tokens)).all():
            return False
        for layer in layers:
            layer.cumulative_length.copy_(before)
        return True

    return undo


def _undo_of_static_sliding(layer: Any, tokens: int) -> Undo | None:
    length = layer.cumulative_length_int
    if length and length + tokens > layer.max_cache_len:  # it moves, and what was at its beginning is gone
        return None

    def undo() -> bool:
        if layer.cumulative_length_int not in (length, length + tokens):
            return False
        layer.cumulative_length_int = length
        layer.cumulative_length.fill_(length)  # as long as it is not full, both count alike
        return True

    return undo
