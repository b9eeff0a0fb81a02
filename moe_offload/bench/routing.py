"""Recorded expert ids in place of the router's choice, the same ones for every side; and a record of what was used.

    before   experts(hidden_TH, ids_TK, weights_TK)
    after    experts(hidden_TH, moe_offload_bench::routed(ids_TK, layer), weights_TK)

The op stands in the graph like any other: what offloads the model sees ids that come from a router. Row t of a request
takes row t of the trace; the trace begins anew where it ends. How it is mapped to the model at hand, `Recorded.note`
says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError

ROWS = 4096  # of a trace: more are not used

_LIBRARY = torch.library.Library("moe_offload_bench", "DEF")
_LIBRARY.define("routed(Tensor(a!) ids, int layer) -> Tensor")  # it counts its calls: nobody may add one


@dataclass(frozen=True)
class Recorded:
    """`ids_TLK` for each token and MoE layer of the model, and how they came from the trace."""

    ids_TLK: Tensor
    note: str


class Routing:
    """What the op does in this process: replay from row `row` on, and remember the ids of every call."""

    def __init__(self, recorded: Recorded | None, layers: int):
        self.recorded = recorded
        self.rows = [0] * layers
        self.used: list[list[Tensor]] = [[] for _ in range(layers)]

    def seek(self, row: int) -> None:
        """The next request begins at this row of the trace; forget what was used."""
        self.rows = [row] * len(self.rows)
        self.used = [[] for _ in self.rows]

    def __call__(self, ids_TK: Tensor, layer: int) -> Tensor:
        tokens = ids_TK.shape[0]
        if self.recorded is None:
            ids = ids_TK.clone()
        else:
            begin, total = self.rows[layer], len(self.recorded.ids_TLK)
            rows = torch.arange(begin, begin + tokens).remainder_(total)
            ids = self.recorded.ids_TLK[rows, layer].to(ids_TK.dtype)
        self.rows[layer] += tokens
        self.used[layer].append(ids)
        return ids.clone()


_current: Routing | None = None


def _routed(ids_TK: Tensor, layer: int) -> Tensor:
    if _current is None:
        raise RuntimeError("moe_offload_bench::routed was called before install()")
    return _current(ids_TK, layer)


_LIBRARY.impl("routed", _routed, "CompositeExplicitAutograd")
torch.library.register_fake("moe_offload_bench::routed", lambda ids_TK, layer: torch.empty_like(ids_TK), lib=_LIBRARY)


def install(model: nn.Module, names: list[str], recorded: Recorded | None) -> Routing:
    """Put the op before every experts module of `names`. Call it before the model's first forward."""
    global _current
    _current = Routing(recorded, len(names))
    for layer, name in enumerate(names):
        module: Any = model.get_submodule(name)
        module.register_forward_pre_hook(_before(layer))
    return _current


def _before(layer: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_TH, ids_TK, *rest = args
        return hidden_TH, torch.ops.moe_offload_bench.routed(ids_TK, layer), *rest

    return hook


def load_recorded(path: str | Path, layers: int, experts: int, top_k: int) -> Recorded:
    """Map a trace (`experts` [tokens, layers, k], -1 where absent) to a model of `layers`, `experts` and `top_k`.

    Raises `ConfigError` when the file is no such trace.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ids_TLk = file["experts"].astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--routing {path}: expected an .npz with an array 'experts': {error}") from error
    if ids_TLk.ndim != 3 or not ids_TLk.size or ids_TLk.min() < -1:
        raise ConfigError(
            f"--routing {path}: 'experts' must be [tokens, layers, k] with ids from -1, found "
            f"{ids_TLk.shape} from {ids_TLk.min() if ids_TLk.size else 'nothing'}"
        )
    total, recorded_layers, k = ids_TLk.shape
    found = int(ids_TLk.max()) + 1
    columns = [layer * recorded_layers // layers for layer in range(layers)]
    used = ids_TLk[:, columns, :]
    rows = min(total, ROWS)
    ids_TLK = np.empty((rows, layers, top_k), dtype=np.int64)
    for t in range(rows):
        for layer in range(layers):
            further = used[(t + total // 2) % total, layer]
            ids_TLK[t, layer] = _row(used[t, layer], further, experts, top_k)
    notes = [f"{Path(path).stem}, {rows} of {total} tokens, begun anew when they end"]
    if recorded_layers != layers:
        notes.append(f"model layers 0..{layers - 1} replay the recorded layers {', '.join(map(str, columns))}")
    if k < top_k:
        notes.append(f"{top_k} experts a token from {k} recorded ones: the rest from the row half the trace further")
    elif k > top_k:
        notes.append(f"the first {top_k} of {k} recorded experts a token")
    if found > experts:
        notes.append(f"ids modulo {experts} (the trace has {found} experts)")
    elif found <= experts // 2:
        notes.append(f"only experts 0..{found - 1} of {experts} are ever used")
    return Recorded(torch.from_numpy(ids_TLK), "; ".join(notes))


def _row(recorded: np.ndarray[Any, Any], further: np.ndarray[Any, Any], experts: int, top_k: int) -> list[int]:
    """`top_k` distinct experts: the recorded ones, then those of a row further on, then the lowest that are left."""
    chosen: dict[int, None] = {}
    for e in (*recorded.tolist(), *further.tolist(), *range(experts)):
        if len(chosen) == top_k:
            break
        if e >= 0:
            chosen[e % experts] = None
    return list(chosen)
