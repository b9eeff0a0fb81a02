"""Recorded expert ids in place of the router's choice, the same ones for every side; and a record of what was used.

    before   experts(hidden_TH, ids_TK, weights_TK)
    after    experts(hidden_TH, moe_offload_bench::routed(ids_TK, layer), weights_TK)

The op stands in the graph like any other: what offloads the model sees ids that come from a router. Row t of a request
takes row t of the trace; the trace begins anew where it ends. How it is mapped to the model at hand, `Recorded.note`
says.

Where a request stands is a number on the model's device, which the op of the last layer moves on: nothing is asked of
the host, and a CUDA graph that holds the op gives other ids each time it is replayed. It costs one small kernel a
layer, on every side alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, TraceError
from ...experts import MoELayer
from ...observe.trace import Trace

ROWS = 4096  # of a trace: more are not used
SPARE_TOKENS = 8  # behind those of a request: generate() may run a step whose token nobody sees

_LIBRARY = torch.library.Library("moe_offload_bench", "DEF")
_LIBRARY.define("routed(Tensor(a!) ids, int layer) -> Tensor")  # it counts tokens: nobody may add a call, or drop one


@dataclass(frozen=True)
class Recorded:
    """`ids_TLK` for each token and MoE layer of the model, and how they came from the trace."""

    ids_TLK: Tensor
    note: str


class Routing:
    """What the op does in this process, for requests of at most `tokens` tokens of one sequence.

    `tables[l]` int64 [tokens, K] on `device`: the ids of layer l by the tokens of the request at hand. Recorded ones
    are written by `seek`, the router's own by the op.
    """

    def __init__(self, recorded: Recorded | None, top_ks: Sequence[int], tokens: int, device: torch.device | str):
        self.recorded, self.tokens = recorded, tokens
        room = tokens + SPARE_TOKENS
        self.tables = [torch.zeros((room, k), dtype=torch.int64, device=device) for k in top_ks]
        self.token_1 = torch.zeros(1, dtype=torch.int64, device=device)  # of the request, that comes next

    def seek(self, row: int, tokens: int) -> None:
        """The next request is of so many tokens and begins at this row of the trace; forget the one before.

        Raises `ConfigError` for one that there is no room for.
        """
        if tokens > self.tokens:
            raise ConfigError(f"a request of {tokens} tokens: the routing has room for {self.tokens}")
        self.token_1.zero_()
        if self.recorded is not None:
            rows = torch.arange(row, row + tokens + SPARE_TOKENS) % len(self.recorded.ids_TLK)
            for layer, table_TK in enumerate(self.tables):
                table_TK[: len(rows)].copy_(self.recorded.ids_TLK[rows, layer])

    def __call__(self, ids_TK: Tensor, layer: int) -> Tensor:
        tokens, table_TK = ids_TK.shape[0], self.tables[layer]
        rows_T = self.token_1 if tokens == 1 else self.token_1 + torch.arange(tokens, device=ids_TK.device)
        if self.recorded is None:
            table_TK.index_copy_(0, rows_T, ids_TK.to(table_TK.dtype))
            routed_TK = ids_TK.clone()
        else:
            routed_TK = table_TK.index_select(0, rows_T).to(ids_TK.dtype)
        if layer == len(self.tables) - 1:
            self.token_1.add_(tokens)
        return routed_TK

    def used(self, prompt_tokens: int, steps: int) -> list[list[list[int]]]:
        """The experts of each layer's events since `seek`: the prompt's first, then those of each decode step."""
        found = []
        for table_TK in self.tables:
            ids_TK = table_TK[: prompt_tokens + steps].tolist()
            prompt = sorted({e for ids in ids_TK[:prompt_tokens] for e in ids})
            found.append([prompt, *(sorted(set(ids)) for ids in ids_TK[prompt_tokens:])])
        return found


_current: Routing | None = None


def _routed(ids_TK: Tensor, layer: int) -> Tensor:
    if _current is None:
        raise RuntimeError("moe_offload_bench::routed was called before install()")
    return _current(ids_TK, layer)


_LIBRARY.impl("routed", _routed, "CompositeExplicitAutograd")
torch.library.register_fake("moe_offload_bench::routed", lambda ids_TK, layer: torch.empty_like(ids_TK), lib=_LIBRARY)


def is_replayable(moe_layers: Sequence[MoELayer]) -> bool:
    """Whether every layer's experts module is handed the ids: else they can be neither replaced nor noted."""
    return all(moe.form == "interface" for moe in moe_layers)


def check_replayable(moe_layers: Sequence[MoELayer]) -> None:
    """Raise `ConfigError`, naming the layer, where recorded ids cannot take the place of the router's."""
    for moe in moe_layers:
        if moe.form != "interface":
            raise ConfigError(
                f"--routing: {moe.name} is not handed the ids of its experts (form {moe.form!r}), so recorded ones "
                "cannot take their place. Leave it out: the model's own router chooses"
            )


def install_routing(model: nn.Module, names: list[str], routing: Routing) -> None:
    """Put the op before every experts module of `names`. Call it before the model's first forward."""
    global _current
    _current = routing
    for layer, name in enumerate(names):
        module: Any = model.get_submodule(name)
        module.register_forward_pre_hook(_before(layer))


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
        ids_TLk = Trace.load(path).experts_TLK.astype(np.int64)
    except TraceError as error:
        raise ConfigError(f"--routing: {error}") from error
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
