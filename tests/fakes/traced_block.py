"""Fakes for passes: trace a small experts module, and fakes of the runtime that serve its rewritten graph.

Shapes: T tokens, K experts per token, P = T*K pairs, E experts, S slots, H hidden.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import passes
from passes import ops


@dataclass(frozen=True)
class FakeField:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int


class Block(nn.Module):
    """A router and an experts module of transformers: hidden [T, H] -> [T, H]. The router uses the true ids again."""

    def __init__(self, experts: nn.Module, hidden: int, num_experts: int, top_k: int):
        super().__init__()
        self.experts, self.top_k = experts, top_k
        self.router = nn.Parameter(torch.randn(num_experts, hidden))
        self.scale = nn.Parameter(torch.rand(num_experts) + 0.5)
        self.route: Any = torch.topk

    def forward(self, hidden_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.route((hidden_TH @ self.router.t()).softmax(-1), self.top_k)
        return self.experts(hidden_TH, ids_TK, weights_TK * self.scale[ids_TK])


@dataclass
class Traced:
    """A Dynamo graph of a `Block`, its inputs, and which placeholders hold expert weights."""

    gm: GraphModule
    inputs: list[Any]
    weights: dict[Node, passes.Weight]
    params: dict[str, Tensor]

    def copy(self) -> Traced:
        gm = copy.deepcopy(self.gm)
        names = {node.name: weight for node, weight in self.weights.items()}
        return Traced(gm, self.inputs, {n: names[n.name] for n in gm.graph.nodes if n.name in names}, self.params)

    def sites(self) -> list[passes.Site]:
        return passes.find_sites(self.gm.graph, self.weights)

    def run(self, served: dict[Node, Tensor] | None = None) -> Tensor:
        self.gm.recompile()
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        inputs = [(served or {}).get(n, x) for n, x in zip(placeholders, self.inputs, strict=True)]
        with torch.no_grad():
            return self.gm(*inputs)[0]


def trace(block: Block, hidden_TH: Tensor, dynamic: bool | None = None) -> Traced:
    captured: list[tuple[GraphModule, list[Any]]] = []

    def capture(gm: GraphModule, inputs: list[Any]) -> Any:
        captured.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(block, backend=capture, fullgraph=True, dynamic=dynamic)(hidden_TH)
    gm, inputs = captured[0]
    params = dict(block.experts.named_parameters(recurse=False))
    by_id = {id(p): n for n, p in params.items()}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    weights = {
        node: passes.Weight("layer", by_id[id(x)], params[by_id[id(x)]].shape[0])
        for node, x in zip(placeholders, inputs, strict=True)
        if id(x) in by_id
    }
    # What Dynamo hands over for activations and sizes may be fake; run with the real ones.
    real = [_real(node, x, block, hidden_TH) for node, x in zip(placeholders, inputs, strict=True)]
    return Traced(gm, real, weights, params)


def _real(node: Node, value: Any, block: Block, hidden_TH: Tensor) -> Any:
    if isinstance(value, nn.Parameter):
        return value
    if not isinstance(value, Tensor):
        return len(hidden_TH)
    if value.dim() == 0:  # a number of the module, for example its clamp limit
        holders = {name.replace(".", "_modules_"): m for name, m in block.experts.named_modules()}
        path = node.name.partition("modules_experts_")[2].removeprefix("modules_")
        holder = max((name for name in holders if path.startswith(name)), key=len)
        return torch.tensor(getattr(holders[holder], path[len(holder) :].lstrip("_")), dtype=torch.float64)
    return hidden_TH


def layout(params: dict[str, Tensor]) -> tuple[tuple[FakeField, ...], int]:
    fields, end = [], 0
    for name, p in params.items():
        nbytes = p[0].numel() * p.element_size()
        fields.append(FakeField(name, tuple(p.shape[1:]), p.dtype, end, nbytes))
        end += -(-nbytes // 64) * 64
    return tuple(fields), end


@dataclass
class FakeLayer:
    """Every expert resident from the start, expert e in slot `slot_of[e]`; other slots hold NaN. Records its calls."""

    params: dict[str, Tensor]
    slot_of: list[int]
    slots: int
    calls: list[str] = field(default_factory=list)
    wave: int = 0  # experts per wave of stream; 0: all at once

    def __post_init__(self) -> None:
        fields, row_bytes = layout(self.params)
        dtypes = {f.dtype for f in fields}
        self.bank = passes.Bank(fields, self.slots, dtypes.pop() if len(dtypes) == 1 else torch.uint8)
        self.bank_SN = torch.full((self.slots, row_bytes), 0xFF, dtype=torch.uint8).view(self.bank.dtype)
        views = self.bank.views(self.bank_SN)
        for e, slot in enumerate(self.slot_of):
            if slot >= 0:
                for name, p in self.params.items():
                    views[name][slot] = p[e].detach()
        ops.bind(self.bank_SN, self)

    def _slots(self, ids: Tensor) -> Tensor:
        return torch.tensor(self.slot_of)[ids]

    def fetch(self, ids_P: Tensor) -> Tensor:
        self.calls.append(f"fetch {sorted(set(ids_P.flatten().tolist()))}")
        return self._slots(ids_P)

    def wait(self, slots_P: Tensor) -> Tensor:
        self.calls.append("wait")
        return slots_P.clone()

    def place(self, ids_P: Tensor) -> Tensor:
        self.calls.append("place")
        return self._slots(ids_P)

    def place_top(self, scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("place_top")
        values_TK, ids_TK = torch.topk(scores_TE, k)
        return values_TK, ids_TK, self._slots(ids_TK.flatten())

    def stream(self, x_P: Tensor, ids_P: Tensor, core: passes.Core, others: Any) -> Tensor:
        used = sorted(set(ids_P.tolist()))
        waves = [used] if not self.wave else [used[i : i + self.wave] for i in range(0, len(used), self.wave)]
        self.calls.append(f"stream {len(waves)}")
        out = None
        for wave in waves:
            mine = torch.isin(ids_P, torch.tensor(wave)).nonzero().flatten()
            slots = self._slots(ids_P)[mine] if self.wave else self._slots(ids_P)
            part = core(x_P, slots, self.bank_SN, others, mine if self.wave else None)
            out = part.new_empty((len(ids_P), *part.shape[1:])) if out is None else out
            out[mine] = part
        return out


def identity(params: dict[str, Tensor], **kwargs: Any) -> FakeLayer:
    num_experts = next(iter(params.values())).shape[0]
    return FakeLayer(params, list(range(num_experts)), num_experts, **kwargs)


def permuted(params: dict[str, Tensor], seed: int = 0, spare: int = 2, **kwargs: Any) -> FakeLayer:
    """Slots in random order, with NaN slots between: a forgotten weight or a true id left anywhere shows at once."""
    num_experts = next(iter(params.values())).shape[0]
    order = torch.randperm(num_experts + spare, generator=torch.Generator().manual_seed(seed))
    return FakeLayer(params, order[:num_experts].tolist(), num_experts + spare, **kwargs)


class FakeCounter:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def observe(self, ids_P: Tensor) -> None:
        self.seen += ids_P.flatten().tolist()
