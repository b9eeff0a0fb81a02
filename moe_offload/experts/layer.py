"""`MoELayer`: the experts of one layer, whatever form the model holds them in, and the layout of one row.

A model holds experts in one of several forms (`table.py`). What the rest of the package asks of a layer is the same for
all: which parameters are experts' (`tensors`), what one expert's are (`expert`), and where each lies (`places`).

    stacked              experts.gate_up_proj [E, 2I, H]       one place, of all experts
    a module per expert  experts.3.w1.weight  [I, H]           a place for each expert
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from .layout import Begins, PackedWeight, RowLayout
from .share import Share, local_part

Held = TypeVar("Held")
#: A module in which a form has found experts: (its name, the module, what it holds them in).
Holder = tuple[str, nn.Module, Held]


@dataclass(frozen=True)
class Place:
    """Where a model has one parameter of experts: it is `module`'s own `attribute`.

    `key` is its name in the state_dict of the layer's module, `field` its name in a row, and `expert` whose it is; None
    if it is a stack of all experts.
    """

    module: Any
    attribute: str
    key: str
    field: str
    expert: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The parameter as the module holds it now: after `optimize`, a phantom."""
        found: Tensor = getattr(self.module, self.attribute)
        return found

    @property
    def held(self) -> Tensor:
        """What this process holds of it: all, but for a model that is split over several."""
        return local_part(self.tensor)

    def holds(self, e: int, shape: tuple[int, ...]) -> bool:
        """Whether it has a share of expert `e`, of the field's `shape`: a stack may be shorter than another."""
        return e < self.count(shape) if self.expert is None else e == self.expert

    def count(self, shape: tuple[int, ...]) -> int:
        """How many experts' shares, of the field's `shape`, it has."""
        tensor = self.held
        return 1 if self.expert is not None else tensor.numel() // math.prod(shape)

    def of_expert(self, e: int, shape: tuple[int, ...]) -> Tensor:
        """The share of expert `e`, of the field's `shape`; a view."""
        tensor = self.held.detach()
        if self.expert is not None:
            return tensor
        return tensor[e] if tuple(tensor.shape[1:]) == shape else tensor.view(-1, *shape)[e]


@dataclass(frozen=True)
class MoELayer:
    """The experts of one layer: the module(s) that hold them and the layout of one row.

    `modules` has more than one entry only where a model ties the same parameters into several modules; `places` says of
    each where its parameters are. `layout` is how a row rests and moves, `unpacked` how the module's parameters would
    lie in one; they differ where `packed` names the weights that rest packed. `form` is the name, in `FORMS`, of how
    the model holds and uses them. With `called` the model's own code calls or reads one expert at a time, outside of
    any graph; else its experts are seen in a graph, and the passes rewrite that. Of a model that is split over several
    processes these are the experts of this one, numbered from 0, and `share` says which they are. `elsewhere` are the
    experts whose fields do not begin as far from a cache line as the layout says, in plain transformers, and where they
    do.
    """

    index: int
    names: tuple[str, ...]
    modules: tuple[Any, ...]  # nn.Modules; Any, because mypy does not know the attributes that transformers gives them
    num_experts: int
    top_k: int
    layout: RowLayout
    unpacked: RowLayout
    packed: tuple[PackedWeight, ...] = ()
    form: str = "interface"
    called: bool = False
    places: tuple[tuple[Place, ...], ...] = ()
    share: Share | None = None
    elsewhere: Mapping[int, Begins] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def floor(self) -> int:
        """The fewest slots that work: those of one token; where experts are called one by one, a single one."""
        return 1 if self.called else min(self.top_k, self.num_experts)

    @property
    def all_experts(self) -> int:
        """How many experts the layer has, in all processes."""
        return self.num_experts if self.share is None else self.share.total

    @property
    def first_expert(self) -> int:
        """Which of them expert 0 of this process is."""
        return 0 if self.share is None else self.share.first

    def has_any(self, ids_TK: Tensor) -> bool:
        """Whether any of these experts is one of this process: else there is nothing to compute."""
        return self.share is None or bool(((ids_TK >= 0) & (ids_TK < self.num_experts)).any())

    def own_uses(self, ids: list[int]) -> tuple[list[int], Counter[int]]:
        """The ids, and how often each of this process is there; those of other processes all become E, and do not
        count."""
        if self.share is None:
            return ids, Counter(ids)
        ids = [self.num_experts if e == -1 else e for e in ids]
        used = Counter(ids)
        del used[self.num_experts]
        return ids, used

    @property
    def complete(self) -> int:
        """How many experts, the first ones, have a share of every stack. The others are identities, and never read."""
        shapes = {field.name: field.shape for field in self.unpacked.fields}
        stacks = [place for place in self.own_places if place.expert is None]
        return min((place.count(shapes[place.field]) for place in stacks), default=self.num_experts)

    @property
    def must_be_finite(self) -> bool:
        """Whether an expert that gets no token is left out because of zeros in its input (`passes/masked.py`)."""
        return self.form == "masked"

    def beginning(self, begins_E: Sequence[Begins]) -> MoELayer:
        """The same, with rows whose fields begin as far from a cache line as most experts' do in plain transformers."""
        begins_E = begins_E[: self.complete]  # of the others nothing is read
        [(most, _)] = Counter(begins_E).most_common(1)
        layout = self.unpacked.beginning(most)
        elsewhere = {e: begins for e, begins in enumerate(begins_E) if begins != most}
        return replace(self, layout=layout, unpacked=layout, elsewhere=elsewhere)

    def as_unpacked(self) -> MoELayer:
        """The same, with rows that hold the parameters themselves."""
        return replace(self, layout=self.unpacked, packed=())

    def unpack_row(self, row: Tensor, out: Tensor) -> Tensor:
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
        """The stacked parameters `{field name: [E, ...]}` as the module holds them now; none without a stack."""
        return {place.field: place.tensor for place in self.own_places if place.expert is None}  # type: ignore[misc]

    @property
    def own_places(self) -> tuple[Place, ...]:
        """The places of the first module: each parameter once."""
        return self.places[0] if self.places else ()

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Every parameter of experts, as the modules hold them now."""
        return (place.tensor for places in self.places for place in places)

    @property
    def is_meta(self) -> bool:
        """Whether the experts have no bytes yet: they are read from the checkpoint."""
        return bool(self.own_places) and self.own_places[0].held.is_meta

    def expert(self, e: int) -> dict[str, Tensor]:
        """The parameters of expert `e` by field, as the model holds them now; views. An expert that has no weights of
        its own (an identity) may have a share of some stacks only."""
        shapes = {field.name: field.shape for field in self.unpacked.fields}
        found = [place for place in self.own_places if place.holds(e, shapes[place.field])]
        return {place.field: place.of_expert(e, shapes[place.field]) for place in found}

    @property
    def nbytes(self) -> int:
        return self.num_experts * self.layout.row_bytes

    def tokens_of(self, pairs: int) -> int:
        """How many tokens have so many token-expert pairs; an experts module may leave out those of other ranks."""
        return -(-pairs // self.top_k)


def group_tied(
    model: nn.Module, find: Callable[[str, nn.Module], Held], params: Callable[[Held], Iterable[Tensor]]
) -> list[list[Holder[Held]]]:
    """The modules in which `find` finds something; together those whose `params` are the same."""
    found: dict[tuple[int, ...], list[Holder[Held]]] = {}
    for name, module in model.named_modules():
        held = find(name, module)
        if held:
            found.setdefault(tuple(map(id, params(held))), []).append((name, module, held))
    return list(found.values())


def layer_of(
    form: str,
    index: int,
    holders: Sequence[Holder[Held]],
    layout: RowLayout,
    num_experts: int,
    top_k: int | None,
    places: Callable[[nn.Module, Held], Iterable[Place]],
    called: bool = True,
) -> MoELayer:
    """The layer that `holders` are together. `top_k` is None where nothing says it: then it may be all experts."""
    return MoELayer(
        index,
        tuple(name for name, _, _ in holders),
        tuple(module for _, module, _ in holders),
        num_experts,
        min(top_k or num_experts, num_experts),
        layout,
        layout,
        form=form,
        called=called,
        places=tuple(tuple(places(module, held)) for _, module, held in holders),
    )


def stack_places(module: nn.Module, stacks: Iterable[str]) -> Iterable[Place]:
    """The places of stacks, which are parameters of `module` itself."""
    return (Place(module, field, field, field) for field in stacks)
