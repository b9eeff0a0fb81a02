"""What one decode step has relied on, and whether it still holds.

    of the model       each module and object that its guards read: its type, and the versions of its dictionaries
    of cache layers    the same of each layer
    of all tensors     what a guard asks of them: type, dtype, device, sizes, strides, requires_grad, dispatch keys
    of hooks           how many were ever put on, anywhere (`dynamo.py`)
    of everything else the guards themselves, in a copy of Dynamo's own tree: arguments, global names, modes, settings

Python gives a dictionary another version with every change; equal ones are the same dictionary with the same content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch_sizes import find_cache
from .arguments import with_known_arguments
from .guards import Search

GRAPH = "__compiled_fn"  # how Dynamo names the graph that its code calls


class Kept(NamedTuple):
    """What one step has relied on, and what runs the next one if it still holds."""

    function: Any  # the compiled one's original, by whose code Dynamo keeps what it has compiled
    guards: Any  # Dynamo's, of the step
    others: Any  # a copy of them, without those that are held
    held: Any  # of the model: versions and types of `objects`
    objects: dict[str, tuple[Any, ...]]
    held_layers: Any  # the same of the layers of a cache that do not change with each step
    steady_layers: tuple[int, ...]  # which those are
    other_layers: tuple[int, ...]
    parts: tuple[tuple[str, Any], ...]  # of the model itself: its dictionary changes for other reasons
    names: dict[str, Any]  # that dictionary
    tensor_facts: Any
    tensors: tuple[Tensor, ...]
    layer_facts: Any
    layer_tensors: tuple[tuple[int, Callable[[Any], tuple[Tensor, ...]]], ...]
    tensor_ids: frozenset[int]
    of_classes: tuple[tuple[type, str, Any], ...]
    hooks: int
    cells: dict[str, Any]
    run: Callable[..., Any]

    def may_hold(self) -> bool:
        """Whether the model is as it was, whatever it is asked."""
        as_before = bool(self.held.check(self.objects))
        return as_before and all(self.names.get(name) is part for name, part in self.parts)

    def holds(self, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: int) -> bool:
        cache: Any = find_cache(kwargs)
        layers = getattr(cache, "layers", None)
        if type(layers) is not list or hooks != self.hooks:
            return False
        if len(layers) != len(self.steady_layers) + len(self.other_layers):
            return False
        if not self.held_layers.check({"held": tuple([layers[i] for i in self.steady_layers])}):
            return False
        if not self.may_hold():
            return False
        if any(getattr(kind, name, None) is not value for kind, name, value in self.of_classes):
            return False
        if not self.tensor_facts.check(*self.tensors):
            return False
        if not self.layer_facts.check(*[x for i, get in self.layer_tensors for x in get(layers[i])]):
            return False
        given = [*_tensor_ids((*args, *kwargs.values()))]
        for i in self.other_layers:
            given += _tensor_ids(vars(layers[i]).values())
        if len(set(given)) != len(given) or not self.tensor_ids.isdisjoint(given):
            return False
        if not self.others.check({"args": args, "kwargs": kwargs, **self.cells}):
            return False
        return _is_default_stance() and any(one.guard_manager is self.guards for one in _entries(self.function))


def keep_step(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: int, steady_layers: Sequence[int]
) -> Kept | None:
    """What the step that has just run relied on. None where Dynamo has compiled nothing for it, or code that does no
    more than call what is compiled. `steady_layers` of the KV cache do not change with each step.

    What `function` is compiled to is found by the guards that hold now. It is the one that ran, as each has code of its
    own (`with_own_code`), and a step changes nothing that its own guards read.
    """
    cells = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }
    frame = {"args": args, "kwargs": kwargs, **cells}
    entry = next((one for one in _entries(function) if one.guard_manager.check(frame)), None)
    if entry is None or not any(name.startswith(GRAPH) for name in entry.code.co_names):
        return None
    layers = list(find_cache(kwargs).layers)
    model = cells["model"]
    search = Search(model, {i: layers[i] for i in steady_layers})
    search.visit_root(entry.guard_manager.root, frame)
    others = entry.guard_manager.root.clone_manager(lambda node: id(node) not in search.left_out)
    if not others.check(frame):
        return None
    run = FunctionType(entry.code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    run.__kwdefaults__ = function.__kwdefaults__
    steady = [*search.parts.values(), *search.objects.values()]
    objects = tuple(search.objects.values())
    tensors = tuple(search.tensors.values())
    names_of: dict[int, list[str]] = {}
    for i, name in search.layer_tensors:
        names_of.setdefault(i, []).append(name)
    layer_tensors = tuple((i, _getter(names)) for i, names in names_of.items())
    of_layers = [x for i, get in layer_tensors for x in get(layers[i])]
    facts = partial(torch._C._dynamo.guards.TensorGuards, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return Kept(
        function,
        entry.guard_manager,
        others,
        versions_of(objects),
        {"held": objects},
        versions_of(tuple(layers[i] for i in steady_layers)),
        tuple(steady_layers),
        tuple(set(range(len(layers))).difference(steady_layers)),
        tuple(search.parts.items()),
        vars(model),
        facts(*tensors),
        tensors,
        facts(*of_layers),
        layer_tensors,
        frozenset(map(id, (*tensors, *of_layers))),
        tuple((kind, name, value) for (kind, name), value in search.of_classes.items()),
        hooks,
        cells,
        with_known_arguments(run, args, kwargs, GRAPH, steady),
    )


def _tensor_ids(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, Tensor):
            yield id(value)
        elif isinstance(value, dict):
            yield from _tensor_ids(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensor_ids(value)


def _getter(names: list[str]) -> Callable[[Any], tuple[Tensor, ...]]:
    """A tuple of these attributes; attrgetter gives no tuple of one."""
    get: Callable[[Any], Any] = attrgetter(*names)
    return get if len(names) > 1 else lambda layer: (get(layer),)


def versions_of(objects: tuple[Any, ...]) -> Any:
    """Guards, for {"held": objects}, that each has the type it has now, and its dictionary the same version."""
    from torch._dynamo.guards import GuardManagerType

    root = torch._C._dynamo.guards.RootGuardManager()
    kind = GuardManagerType.GUARD_MANAGER
    whole = root.framelocals_manager(("held", 0), "held", objects, kind)
    whole.add_length_check_guard(len(objects), ["as many"], None)
    for i, one in enumerate(objects):
        item = whole.tuple_getitem_manager(i, f"held[{i}]", one, kind)
        if type(one) is not dict:  # to which Python gives no other type
            item.add_type_match_guard(id(type(one)), ["the same type"], None)
        if isinstance(one, dict):
            item.add_dict_version_guard(one, ["the same version"], None)
        else:
            inner = item.get_generic_dict_manager(f"held[{i}].__dict__", vars(one), kind)
            inner.add_dict_version_guard(vars(one), ["the same version"], None)
    return root


def _entries(function: Any) -> list[Any]:
    """What Dynamo has compiled for `function`, and would run."""
    entries: list[Any] = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    return entries


def _is_default_stance() -> bool:
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance == "default"
