"""Which modules of a model hold experts, and how one expert's tensors lie in its row.

Shapes: E experts of a layer, K experts per token, H hidden, I inner.

A *row* is everything one expert needs (weights, biases, scales) as one contiguous, 4 KiB-aligned block of bytes: it
moves, and is committed, as a unit. Fields follow each other in the order the module declares them, each aligned to 64
bytes so that a kernel sees the alignment it would see in an ordinary tensor:

    row of qwen3_moe   | gate_up_proj [2I, H] | down_proj [H, I] | padding to 4 KiB |
    row of gpt_oss     | gate_up_proj [H, 2I] | gate_up_proj_bias [2I] | down_proj [I, H] | down_proj_bias [H] | ... |

Of a quantised checkpoint a row holds what the files hold, *packed*, and its weights are unpacked where they are used:

    row of qwen3_moe, FP8   | gate_proj F8 [I, H] | its scales | up_proj F8 [I, H] | its scales | down_proj ... |

Longer than 250 lines: the layout of a row is read off the module that is found here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from .errors import OffloadError, UnsupportedModelError

ROW_ALIGN = 4096  # the unit of O_DIRECT and of a page
FIELD_ALIGN = 64  # a cache line, and what torch's own CPU allocator gives

# The names under which configurations keep K. Only the plan's floor depends on it, never a result.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Field:
    """One parameter's share of a row: `shape` and `nbytes` are those of a single expert."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int

    def view_in(self, row: torch.Tensor) -> torch.Tensor:
        """The field itself, of a row uint8 [row_bytes]."""
        return row[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class RowLayout:
    """Where each field of one expert lies in its row."""

    fields: tuple[Field, ...]
    row_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The element type in which a bank of such rows is seen: the fields' own where they share one, else bytes."""
        kinds = {field.dtype for field in self.fields}
        return kinds.pop() if len(kinds) == 1 else torch.uint8

    @classmethod
    def of(cls, params: dict[str, torch.Tensor]) -> RowLayout:
        """Lay out stacked parameters `{name: [E, ...]}`, in the order given."""
        return cls.in_order((name, tuple(param.shape[1:]), param.dtype) for name, param in params.items())

    @classmethod
    def in_order(cls, parts: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> RowLayout:
        """Lay out tensors of one expert, given as (name, shape, dtype), one after the other."""
        fields, end = [], 0
        for name, shape, dtype in parts:
            nbytes = math.prod(shape) * dtype.itemsize
            offset = round_up(end, FIELD_ALIGN)
            fields.append(Field(name, shape, dtype, offset, nbytes))
            end = offset + nbytes
        return cls(tuple(fields), round_up(end, ROW_ALIGN))


class PackedWeight(Protocol):
    """One parameter of an expert that lies packed in its row, and is unpacked where it is used.

    Shapes: M token-expert pairs, I inputs, O outputs of the product. Rows are uint8 [row_bytes], contiguous.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def format(self) -> str:
        """The name of the format it rests in, for people."""

    @property
    def recipe(self) -> str:
        """What is unpacked and how, as text: two weights with the same text unpack the same bytes alike."""

    @property
    def workspace_bytes(self) -> int:
        """What unpacking takes at a time."""

    def unpack(self, row: torch.Tensor, out: torch.Tensor) -> None:
        """Write the parameter into `out`, of its shape and dtype."""

    def multiply(self, x_MI: torch.Tensor, row: torch.Tensor, out_MO: torch.Tensor, transposed: bool) -> None:
        """`out = x @ W`, or `x @ W.T` if `transposed`: the bits of that product with the unpacked parameter."""


@dataclass(frozen=True)
class MoELayer:
    """The experts of one layer: the module(s) that hold them and the layout of one row.

    `modules` has more than one entry only where a model ties the same parameters into several modules. `layout` is how
    a row rests and moves, `unpacked` how the module's parameters would lie in one; they differ where `packed` names the
    weights that rest packed.
    """

    index: int
    names: tuple[str, ...]
    modules: tuple[Any, ...]  # nn.Modules; Any, because mypy does not know the attributes that transformers gives them
    num_experts: int
    top_k: int
    layout: RowLayout
    unpacked: RowLayout
    packed: tuple[PackedWeight, ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]

    def as_unpacked(self) -> MoELayer:
        """The same, with rows that hold the parameters themselves."""
        return replace(self, layout=self.unpacked, packed=())

    def unpack_row(self, row: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """A row as it rests [row_bytes] -> `out`, the parameters as `unpacked` lays them out; returns that."""
        plain = {field.name: field for field in self.layout.fields}
        packed = {weight.name: weight for weight in self.packed}
        for field in self.unpacked.fields:
            into = field.view_in(out)
            if field.name in packed:
                packed[field.name].unpack(row, into)
            else:
                into.copy_(plain[field.name].view_in(row))
        return out

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The stacked parameters `{field name: [E, ...]}` as the module holds them now."""
        return {field.name: getattr(self.modules[0], field.name) for field in self.unpacked.fields}

    @property
    def nbytes(self) -> int:
        return self.num_experts * self.layout.row_bytes

    def tokens_of(self, pairs: int) -> int:
        """How many tokens have so many token-expert pairs; an experts module may leave out those of other ranks."""
        return -(-pairs // self.top_k)


def find_experts(model: nn.Module) -> list[MoELayer]:
    """Every routed-experts module of `model`, in order, one `MoELayer` per distinct set of parameters.

    A module qualifies when it dispatches through transformers' experts interface: that is what makes its weights
    appear in a traced graph as `W[ids]` or `grouped_mm(x, W, offs)`, the two forms the passes know.

    Raises `UnsupportedModelError`, naming the module, when there is none, or when one cannot be rewritten exactly.
    """
    found: dict[tuple[int, ...], list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            if hasattr(module, "_moe_offload"):
                raise OffloadError(
                    f"{name} is already offloaded, by optimize() of this model or of one that shares its modules; use "
                    "that model's handle (model.moe_offload), or load the model again"
                )
            key = tuple(id(param) for param in stacked_params(name, module).values())
            found.setdefault(key, []).append((name, module))
    if not found:
        raise UnsupportedModelError(_why_none(model))
    moe_layers: list[MoELayer] = []
    for members in found.values():
        name, module = members[0]
        params = stacked_params(name, module)
        num_experts = next(iter(params.values())).shape[0]
        top_k = min(_top_k(name, module, model), num_experts)
        layout = RowLayout.of(params)
        moe_layers.append(
            MoELayer(
                len(moe_layers),
                tuple(n for n, _ in members),
                tuple(m for _, m in members),
                num_experts,
                top_k,
                layout,
                layout,
            )
        )
    return moe_layers


def is_experts(module: nn.Module) -> bool:
    """Whether the class of `module` was decorated with transformers' `use_experts_implementation`."""
    return all(hasattr(module, a) for a in ("has_gate", "has_bias", "is_transposed"))


def stacked_params(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that routing selects from, `{name: [E, ...]}`; raises where the module cannot be rewritten."""
    if getattr(module, "_is_expert_parallel", False):  # transformers 5.17 has no such attribute
        raise UnsupportedModelError(
            f"{name}: its experts are split over processes by expert parallelism, which moe_offload does not handle "
            "yet; load the model in one process, without a DistributedConfig"
        )
    wanted = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    if module.has_bias:
        wanted = [n for w in wanted for n in (w, f"{w}_bias")]
    params: dict[str, torch.Tensor] = {}
    for want in wanted:
        param = getattr(module, want, None)
        if not isinstance(param, torch.Tensor) or param.dim() < 2:
            raise UnsupportedModelError(
                f"{name}: expected a stacked parameter {want!r} of shape [experts, ...], found "
                f"{type(param).__name__}; {type(module).__name__} stores its experts in another way"
            )
        params[want] = param
    own = dict(module.named_parameters(recurse=False))
    extra = sorted(set(own) - set(wanted))
    if extra:
        raise UnsupportedModelError(
            f"{name}: has parameters {extra} besides {wanted}; a quantised or customised experts module is not "
            "supported yet (its scales would not move with its weights)"
        )
    sizes = {param.shape[0] for param in params.values()}
    if len(sizes) != 1:
        raise UnsupportedModelError(f"{name}: its stacked parameters disagree on the number of experts: {sizes}")
    return params


def _top_k(name: str, module: nn.Module, model: nn.Module) -> int:
    """K, from the experts module's own configuration or from the module that routes to it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    holders = [module, parent, *parent.children(), getattr(module, "config", None), getattr(model, "config", None)]
    for holder in holders:
        for key in TOP_K_NAMES:
            value = getattr(holder, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise UnsupportedModelError(
        f"{name}: cannot tell how many experts a token uses; looked for {', '.join(TOP_K_NAMES)} on the module, its "
        "router and the configuration"
    )


def _why_none(model: nn.Module) -> str:
    """Say what kind of MoE layer the model has, if any, and why it is not one the passes can rewrite."""
    for name, reason in _unsupported_moe(model):
        return (
            f"{type(model).__name__}: {name} {reason}, so its weights never reach a graph that the passes can rewrite."
        )
    return (
        f"{type(model).__name__} has no routed experts: no module dispatches through transformers' experts interface "
        "(use_experts_implementation). moe_offload helps Mixture-of-Experts models only."
    )


def _unsupported_moe(model: nn.Module) -> Iterator[tuple[str, str]]:
    """MoE-looking modules outside the experts interface, innermost description first."""
    for name, module in model.named_modules():
        kind, members = type(module).__name__, [m for m in module.children() if isinstance(m, nn.Module)]
        if "expert" not in f"{name.rpartition('.')[2]} {kind}".lower() and "moe" not in kind.lower():
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
            yield name, f"({kind}) keeps each of its {len(module)} experts in a module of its own"
        elif not isinstance(module, nn.Embedding) and any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            yield name, f"({kind}) stacks its experts but does not dispatch through transformers' experts interface"
        elif members and sum(isinstance(m, nn.Embedding) for m in members) > 1:
            yield name, f"({kind}) keeps its experts as rows of nn.Embedding, outside transformers' experts interface"
