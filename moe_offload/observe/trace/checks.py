"""Whether arrays can have been produced by a router and a cache. Shapes and names: see `Trace`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_EXPERTS = 2**15 - 1  # ids are kept as int16
MAX_LAYERS = 2**12
CHECKED_IDS = 2**20  # sorted in one go, so that a check takes less memory than what it checks


class CheckedArrays(NamedTuple):
    """The arrays of a trace, in the order of its fields, in their own dtypes."""

    experts_TLK: NDArray[np.int16]
    num_experts: tuple[int, ...]
    request_start: NDArray[np.int64]
    event_start: NDArray[np.int64]
    weights_TLK: NDArray[np.floating[Any]] | None


def check_arrays(
    experts_TLK: NDArray[Any],
    request_start: Any,
    event_start: Any,
    weights_TLK: NDArray[Any] | None,
    num_experts: Any,
) -> CheckedArrays:
    """The arrays of a trace; `None` where there is none. Raises ValueError."""
    if experts_TLK.ndim != 3 or not experts_TLK.size:
        raise ValueError(f"experts has the shape {experts_TLK.shape}, not [tokens, layers, k]")
    if experts_TLK.dtype.kind not in "iu":
        raise ValueError(f"experts are {experts_TLK.dtype}, not integers")
    lowest, highest = int(experts_TLK.min()), int(experts_TLK.max())
    if lowest < -1 or not 0 <= highest < MAX_EXPERTS:
        raise ValueError(f"expert ids are {lowest} to {highest}; they must be -1 to {MAX_EXPERTS - 1}, and not all -1")
    tokens, layers, _ = experts_TLK.shape
    if layers > MAX_LAYERS:
        raise ValueError(f"experts has {layers} layers; the limit is {MAX_LAYERS}")
    ids_TLK = np.ascontiguousarray(experts_TLK, dtype=np.int16)
    sizes = _sizes(num_experts, layers, highest)
    _check_ids(ids_TLK, np.array(sizes))
    requests = _starts("request_start", request_start, tokens)
    forwards = np.arange(tokens) if event_start is None else _starts("event_start", event_start, tokens)
    if not np.isin(requests, forwards).all():
        raise ValueError("a request starts inside a forward: each request_start must be an event_start too")
    if weights_TLK is not None:
        weights_TLK = np.asarray(weights_TLK)
        if weights_TLK.shape != experts_TLK.shape or weights_TLK.dtype.kind != "f":
            raise ValueError(f"weights are {weights_TLK.dtype} {weights_TLK.shape} for experts {experts_TLK.shape}")
        if not np.isfinite(weights_TLK).all():
            raise ValueError("weights hold NaN or infinity")
    return CheckedArrays(ids_TLK, sizes, requests, forwards, weights_TLK)


def _check_ids(ids_TLK: NDArray[np.int16], sizes_L: NDArray[Any]) -> None:
    """No token may use an expert of a layer twice, or one that the layer does not have."""
    tokens, layers, k = ids_TLK.shape
    rows = max(1, CHECKED_IDS // (layers * k))
    for begin in range(0, tokens, rows):
        sorted_TLK = np.sort(ids_TLK[begin : begin + rows], axis=2)
        twice_TL = ((sorted_TLK[..., 1:] == sorted_TLK[..., :-1]) & (sorted_TLK[..., 1:] >= 0)).any(axis=2)
        if twice_TL.any():
            token, layer = np.argwhere(twice_TL)[0].tolist()
            raise ValueError(f"token {begin + token} names an expert of layer {layer} twice")
        beyond_TL = sorted_TLK[..., -1] >= sizes_L
        if beyond_TL.any():
            token, layer = np.argwhere(beyond_TL)[0].tolist()
            highest = sorted_TLK[token, layer, -1]
            raise ValueError(f"layer {layer} uses expert {highest}, but num_experts says it has {sizes_L[layer]}")


def _starts(name: str, given: Any, tokens: int) -> NDArray[np.int64]:
    """Rows that begin something: from 0, increasing, below `tokens`."""
    given_rows = np.asarray(given)
    if given_rows.ndim != 1 or not given_rows.size or given_rows.dtype.kind not in "iu":
        raise ValueError(f"{name} is {given_rows.dtype} {given_rows.shape}, not a list of row numbers")
    starts: NDArray[np.int64] = given_rows.astype(np.int64)
    if starts[0] != 0 or starts[-1] >= tokens or (np.diff(starts) <= 0).any():
        raise ValueError(f"{name} must begin with 0 and increase, below {tokens} tokens")
    return starts


def _sizes(given: Any, layers: int, highest: int) -> tuple[int, ...]:
    if given is None:
        return (highest + 1,) * layers
    sizes = np.asarray(given)
    if sizes.shape not in {(layers,), ()} or sizes.dtype.kind not in "iu":
        raise ValueError(f"num_experts is {sizes.dtype} {sizes.shape} for {layers} layers")
    if sizes.min() < 1 or sizes.max() > MAX_EXPERTS:
        raise ValueError(f"num_experts is {sizes.min()} to {sizes.max()}; it must be 1 to {MAX_EXPERTS}")
    return tuple(np.broadcast_to(sizes, (layers,)).tolist())
