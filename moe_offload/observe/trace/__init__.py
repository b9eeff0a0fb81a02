"""A trace: the ordered expert ids of a workload, as `simulate` replays them. Bounded `.npz`, read as hostile input.

Shapes: T tokens, L MoE layers, K experts per token, E experts of a layer, R requests, V forwards.

    experts        [T, L, K] integers  ids, distinct in a token and layer; -1 where absent (padding, a smaller top-k)
    request_start  [R] int64           row of each request's first token
    event_start    [V] int64           optional: row of each forward's first token; absent: every token is a forward
    weights        [T, L, K] float     optional: the router's weights of the chosen experts
    num_experts    [L] int64           optional: E of each layer; else "n_experts" of a .json beside it, else the
                                       largest id + 1
    meta           bytes of JSON       optional: {str: str}, such as model_type and source

**Forwards.** A cache is asked once per forward and layer, for the distinct experts of all its rows: one *event*. While
decoding, a forward is one row; a prompt of 500 tokens is one forward of 500 rows, and a batch of 4 sequences decodes in
forwards of 4. `request_start` and `event_start` are all that is needed to replay a run to its very counters: a layer
with nothing but -1 in a forward was not asked, and rows with an id are the tokens of its event. A request never starts
inside a forward. A batch is one request, since its sequences share every forward.

Every failure is a TraceError that names the file, what was found in it, and what to do.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import TraceError
from ...files import npz
from ...files.untrusted import open_regular, read_bounded, refusing_file
from ...files.whole_file import save_whole
from .checks import MAX_EXPERTS, check_arrays

MAX_META_BYTES = 2**16
ARRAYS = {"experts", "request_start", "event_start", "weights", "num_experts", "meta"}


class Event(NamedTuple):
    """What one forward asks of one layer: how many of its tokens use each expert (in order of first use)."""

    used: Counter[int]
    tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The experts that tokens used, in order. Make one with `Trace.of`, read one with `Trace.load`: both check it.

    Args:
        experts_TLK: Expert ids `[T, L, K]` of T tokens, L layers, K experts per token; -1 where there is none.
        num_experts: E of each layer.
        request_start: Where in T each request begins, the first at 0.
        event_start: Where in T each forward begins.
        weights_TLK: The router's weights of the same experts, or None.
        meta: Free text about the workload.

    Raises:
        TraceError: From `of` and `load`, for arrays that no router can have produced, and for a damaged file.

    Example:

        ```python
        model.moe_offload.start_trace()
        model.generate(**inputs, max_new_tokens=2)
        model.moe_offload.save_trace("run.npz")
        print(moe_offload.Trace.load("run.npz").experts_TLK.shape)
        ```
    """

    experts_TLK: NDArray[np.int16]
    num_experts: tuple[int, ...]
    request_start: NDArray[np.int64]
    event_start: NDArray[np.int64]
    weights_TLK: NDArray[np.floating[Any]] | None
    meta: Mapping[str, str]

    @classmethod
    def of(
        cls,
        experts_TLK: NDArray[Any],
        request_start: Sequence[int] | NDArray[Any] = (0,),
        *,
        event_start: Sequence[int] | NDArray[Any] | None = None,
        weights_TLK: NDArray[Any] | None = None,
        num_experts: Sequence[int] | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Trace:
        """A trace of these arrays. Raises TraceError when no router and cache can have produced them."""
        try:
            arrays = check_arrays(np.asarray(experts_TLK), request_start, event_start, weights_TLK, num_experts)
        except ValueError as error:
            raise TraceError(f"these arrays make no trace: {error}") from None
        return cls(*arrays, dict(meta or {}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read and check the trace at `path`, in bounded time and memory. Raises TraceError."""
        path = Path(path)
        remedy = "A trace is an .npz with an array 'experts' [tokens, layers, k], as --save-trace writes it"
        with refusing_file(path, "trace", remedy, TraceError):
            with open_regular(path) as (file, size):
                found = npz.read_arrays(file, size, ARRAYS)
            if "experts" not in found:
                raise ValueError("it has no array 'experts'")
            arrays = check_arrays(
                found["experts"],
                found.get("request_start", (0,)),
                found.get("event_start"),
                found.get("weights"),
                found.get("num_experts", _beside(path)),
            )
            return cls(*arrays, _parsed(found.get("meta")))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` and return it. All or nothing: on any failure (TraceError) an old file is as it was."""
        ids = np.int8 if max(self.num_experts) <= 128 else np.int16
        arrays: dict[str, NDArray[Any]] = {
            "experts": self.experts_TLK.astype(ids),
            "request_start": self.request_start,
            "event_start": self.event_start,
            "num_experts": np.array(self.num_experts, dtype=np.int64),
            "meta": np.frombuffer(json.dumps(dict(self.meta)).encode(), dtype=np.uint8),
        }
        if self.weights_TLK is not None:
            arrays["weights"] = self.weights_TLK
        data = io.BytesIO()
        np.savez_compressed(data, allow_pickle=False, **arrays)
        return save_whole(Path(path), data.getvalue(), "trace", TraceError)

    @property
    def tokens(self) -> int:
        return int(self.experts_TLK.shape[0])

    @property
    def layers(self) -> int:
        return int(self.experts_TLK.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts_TLK.shape[2])

    def requests(self, begin: int, end: int) -> Trace:
        """The requests `begin` to `end` (not included) as a trace of their own."""
        bounds = [*self.request_start.tolist(), self.tokens]
        if not 0 <= begin < end < len(bounds):
            raise TraceError(f"requests {begin} to {end} were asked for; the trace has {len(bounds) - 1}")
        first, stop = bounds[begin], bounds[end]

        def cut(starts: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.asarray(starts[(starts >= first) & (starts < stop)] - first)

        return dataclasses.replace(
            self,
            experts_TLK=self.experts_TLK[first:stop],
            request_start=cut(self.request_start),
            event_start=cut(self.event_start),
            weights_TLK=None if self.weights_TLK is None else self.weights_TLK[first:stop],
        )


def _parsed(meta: NDArray[Any] | None) -> dict[str, str]:
    if meta is None:
        return {}
    if meta.dtype != np.uint8 or meta.nbytes > MAX_META_BYTES:
        raise ValueError(f"meta is {meta.dtype} of {meta.nbytes} bytes, not JSON of at most {MAX_META_BYTES}")
    try:
        found = json.loads(meta.tobytes())
    except RecursionError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("meta is not a JSON object of texts")
    return found


def _beside(path: Path) -> int | None:
    """E as the description beside a shared trace states it: an id that was never used is an expert all the same."""
    try:
        stated = json.loads(read_bounded(path.with_suffix(".json"), MAX_META_BYTES)).get("n_experts")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return stated if type(stated) is int and 1 <= stated <= MAX_EXPERTS else None
