"""Decode steps whose guards need not be asked in full: nothing that they look at has changed since they last held.

For 48 layers Dynamo asks some 8000 guards before it runs what it has compiled, at each step, and nearly all of them
read what hangs on the model or lies in the layers of its KV cache. After a step whose guards held, we keep in their
place

    of the model       each module and object that they read: its type, and the versions of its dictionaries
    of cache layers    the same of each layer
    of all tensors     what a guard asks of them: type, dtype, device, sizes, strides, requires_grad, dispatch keys
    of hooks           how many were ever put on, anywhere (`dynamo.py`)
    of everything else the guards themselves, in a copy of Dynamo's own tree: arguments, global names, modes, settings

Python gives a dictionary another version with every change; equal ones are the same dictionary with the same content.
A guard goes only if it is of a known kind and what it reads is held so, all else stays in the copy. What no version
tells is left as it is with Dynamo: a class's attributes are read once more, and its methods are watched (`dynamo.py`).
Where anything differs, Dynamo is asked, compiles if it must, and the step after that is kept anew.

The code that is run is Dynamo's, and so is what it does besides computing.

Longer than 250 lines: what is kept and the search for what must be are only right together.
"""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch_sizes import find_cache
from .compiling import count_runs

logger = logging.getLogger("moe_offload")
MOST = 4  # that are kept of one function: one for each length of cache
TRIES = 8  # that may turn out of no use, one after the other, before it is given up
#: Guards of a value that is itself held. Constants cannot change; a version, a type and a tensor's facts are compared.
HELD = {"TYPE_MATCH", "ID_MATCH", "DICT_CONTAINS", "DICT_LENGTH", "NO_HASATTR", "NOT_NONE", "LENGTH_CHECK"}
#: Guards of tensors. (A mark for dynamic sizes decides what is compiled, and nothing that is computed.)
OF_TENSORS = {"TENSOR_MATCH", "DIMENSION_DYNAMIC_MARKING_GUARD", "NO_TENSOR_ALIASING", "NO_HASATTR"}
GRAPH = "__compiled_fn"  # how Dynamo names the graph that its code calls
CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
MODULE_PARTS = ("_parameters", "_buffers", "_modules")


class SteadySteps:
    """A compiled function of decode steps, `compiled` by torch.compile from a function of (*args, **kwargs) that closes
    over `model`. `hooks` says how many hooks were ever put on."""

    def __init__(self, compiled: Callable[..., Any], hooks: Callable[[], int]):
        self._compiled, self._hooks = compiled, hooks
        self._function: Any = getattr(compiled, "_torchdynamo_orig_callable", None)
        self._kept: list[_Kept] = []  # the last one used first
        self._useless = 0
        self._last: Any = None  # the cache layers of the step before, by id
        self.taken = 0  # steps that went past Dynamo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for i, kept in enumerate(self._kept):
            if kept.holds(args, kwargs, self._hooks()):
                if i:
                    self._kept.insert(0, self._kept.pop(i))
                self._useless = 0
                self.taken += 1
                return kept.run(*args, **kwargs)
        before = count_runs()
        output = self._compiled(*args, **kwargs)
        if count_runs() == before + 1:  # more, where a graph breaks: then each part is compiled on its own
            self._keep(args, kwargs)
        return output

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what this step has relied on, if the step before was one with the same cache: it takes a tenth of a
        second, and what is compiled may change the model's objects once more."""
        layers = getattr(find_cache(kwargs), "layers", None)
        last, self._last = self._last, layers and [id(layer) for layer in layers]
        if self._function is None or self._useless >= TRIES or not layers or last != self._last:
            return
        self._useless += 1
        try:
            kept = _keep(self._function, args, kwargs, self._hooks())
        except Exception:  # of another version of torch: guards are asked as ever
            self._useless = TRIES
            logger.debug("the guards of decode steps are asked in full at each of them", exc_info=True)
            return
        if kept is not None:  # what of the others can never hold again would keep weights alive that were replaced
            self._kept = [kept, *(one for one in self._kept if one.may_hold())][:MOST]


class _Kept(NamedTuple):
    """What one step has relied on."""

    function: Any  # the compiled one's original, by whose code Dynamo keeps what it has compiled
    guards: Any  # Dynamo's, of the step
    others: Any  # a copy of them, without those that are held
    held: Any  # of the model: versions and types of `objects`
    objects: dict[str, tuple[Any, ...]]
    held_layers: Any  # the same of the layers of a cache
    parts: tuple[tuple[dict[str, Any], str, Any], ...]  # of the model itself: its dictionary changes for other reasons
    tensor_facts: Any
    tensors: tuple[Tensor, ...]
    layer_facts: Any
    layer_tensors: tuple[tuple[int, str], ...]
    tensor_ids: frozenset[int]
    of_classes: tuple[tuple[type, str, Any], ...]
    hooks: int
    cells: dict[str, Any]
    run: Callable[..., Any]

    def may_hold(self) -> bool:
        """Whether the model is as it was, whatever it is asked."""
        as_before = bool(self.held.check(self.objects))
        return as_before and all(names.get(name) is part for names, name, part in self.parts)

    def holds(self, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: int) -> bool:
        cache: Any = find_cache(kwargs)
        layers = getattr(cache, "layers", None)
        if type(layers) is not list or hooks != self.hooks:
            return False
        if not self.held_layers.check({"held": tuple(layers)}) or not self.may_hold():
            return False
        if any(getattr(kind, name, None) is not value for kind, name, value in self.of_classes):
            return False
        if not self.tensor_facts.check(*self.tensors):
            return False
        if not self.layer_facts.check(*[getattr(layers[i], name) for i, name in self.layer_tensors]):
            return False
        given = [id(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if len(set(given)) != len(given) or not self.tensor_ids.isdisjoint(given):
            return False
        if not self.others.check({"args": args, "kwargs": kwargs, **self.cells}):
            return False
        return _is_default_stance() and any(one.guard_manager is self.guards for one in _entries(self.function))


def _keep(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: int) -> _Kept | None:
    """What the step that has just run relied on. None where Dynamo has compiled nothing for it, or code that does no
    more than call what is compiled.

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
    search = _Search(model, layers)
    search.visit_root(entry.guard_manager.root, frame)
    others = entry.guard_manager.root.clone_manager(lambda node: id(node) not in search.left_out)
    if not others.check(frame):
        return None
    run = FunctionType(entry.code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    run.__kwdefaults__ = function.__kwdefaults__
    objects = tuple(search.objects.values())
    tensors = tuple(search.tensors.values())
    layer_tensors = tuple(search.layer_tensors)
    of_layers = [getattr(layers[i], name) for i, name in layer_tensors]
    facts = partial(torch._C._dynamo.guards.TensorGuards, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return _Kept(
        function,
        entry.guard_manager,
        others,
        _versions_of(objects),
        {"held": objects},
        _versions_of(tuple(layers)),
        tuple((vars(model), name, vars(model)[name]) for name in MODULE_PARTS),
        facts(*tensors),
        tensors,
        facts(*of_layers),
        layer_tensors,
        frozenset(map(id, (*tensors, *of_layers))),
        tuple((kind, name, value) for (kind, name), value in search.of_classes.items()),
        hooks,
        cells,
        run,
    )


class _Search:
    """Which nodes of a tree of guards may go: all that they and those below them read is held.

    `left_out` are the ids of these nodes; `objects` and `tensors` are what is to be held in their place, by id,
    `layer_tensors` the tensors that layers of the cache have, by layer and name, `of_classes` what is read of classes.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Any]):
        self.model, self.layers = model, layers
        self.left_out: set[int] = set()
        self.objects: dict[int, Any] = {}
        self.tensors: dict[int, Tensor] = {}
        self.layer_tensors: dict[tuple[int, str], None] = {}
        self.of_classes: dict[tuple[type, str], Any] = {}
        self._of_layer = {id(layer): i for i, layer in enumerate(layers)}
        self._nodes: list[Any] = []  # alive, so that each keeps its id

    def visit_root(self, root: Any, frame: Mapping[str, Any]) -> None:
        """Find what is held in the whole tree: the model itself, and the layers of the cache."""
        for accessor, node in self._children(root):
            name = _argument(accessor)
            if type(accessor).__name__ == "FrameLocalsGuardAccessor" and isinstance(name, str) and name in frame:
                if frame[name] is self.model:
                    self._visit_model(node)
                elif name == "kwargs":
                    self._visit_cache(node, frame[name])

    def _visit_model(self, node: Any) -> None:
        """The model's own dictionary changes with each `generate`; what it names is held one by one."""
        for accessor, below in self._children(node):
            if type(accessor).__name__ != "GetGenericDictGuardAccessor":
                continue
            for inner, part in self._children(below):
                name = _argument(inner)
                if type(inner).__name__ == "DictGetItemGuardAccessor" and name in MODULE_PARTS:
                    self._visit(part, vars(self.model)[name])

    def _visit_cache(self, node: Any, value: Any) -> None:
        """Down to the list of layers, each of which is held."""
        for accessor, below in self._children(node):
            found = _value_of(accessor, value)
            if found is not None and id(found) in self._of_layer and _argument(accessor) == self._of_layer[id(found)]:
                self._visit(below, found)
            elif found is not None and not isinstance(found, (Tensor, *CONSTANTS)):
                self._visit_cache(below, found)

    def _visit(self, node: Any, value: Any, owner: Any = None, name: str = "") -> bool:
        """Whether all that `node`, which reads a held `value`, and the nodes below it ask is held, too."""
        kinds = {type(guard).__name__ for guard in node.get_leaf_guards()}
        below = self._children(node)
        if isinstance(value, Tensor):
            covered = kinds <= OF_TENSORS and not below
            if covered and id(owner) in self._of_layer:
                self.layer_tensors[self._of_layer[id(owner)], name] = None
            elif covered:
                self.tensors[id(value)] = value
        elif isinstance(value, CONSTANTS):
            covered = not below
        else:
            covered = kinds <= HELD
            if isinstance(value, dict) or type(getattr(value, "__dict__", None)) is dict:
                self._hold(value, "NO_HASATTR" in kinds)
                for accessor, child in below:
                    covered &= self._visit_child(accessor, child, value)
            else:
                covered &= not below and isinstance(value, tuple)
        if covered:
            self.left_out.add(id(node))
        return covered

    def _visit_child(self, accessor: Any, node: Any, value: Any) -> bool:
        if isinstance(accessor, _Item):
            return self._visit(node, list(value if accessor.is_key else value.values())[accessor.place])
        kind, name = type(accessor).__name__, _argument(accessor)
        if kind == "GetGenericDictGuardAccessor":
            kinds = {type(guard).__name__ for guard in node.get_leaf_guards()}
            covered = kinds <= HELD
            for inner, child in self._children(node):
                covered &= self._visit_child(inner, child, vars(value))
            if covered:
                self.left_out.add(id(node))
            return covered
        if kind == "DictGetItemGuardAccessor" and isinstance(value, dict) and name in value:
            return self._visit(node, value[name])
        if kind == "GetAttrGuardAccessor" and name in getattr(value, "__dict__", ()):
            return self._visit(node, vars(value)[name], value, name)
        if kind == "GetAttrGuardAccessor" and name is not None:
            of_class = inspect.getattr_static(type(value), name, None)
            if isinstance(of_class, CONSTANTS) and of_class is not None and self._visit(node, of_class):
                self.of_classes[type(value), name] = of_class
                return True
        return False

    def _hold(self, value: Any, lacks: bool) -> None:
        """Hold a value; `lacks`: also that it has no attribute that it has not now."""
        if id(value) not in self._of_layer:
            self.objects[id(value)] = value
            if lacks and isinstance(value, nn.Module):  # an attribute would be looked up in these
                for name in MODULE_PARTS:
                    self.objects[id(vars(value)[name])] = vars(value)[name]

    def _children(self, node: Any) -> list[tuple[Any, Any]]:
        if hasattr(node, "get_key_value_managers"):
            return list(self._items(node))
        found = list(zip(node.get_accessors(), node.get_child_managers(), strict=True))
        self._nodes += [node, *(child for _, child in found)]
        return found

    def _items(self, node: Any) -> Iterator[tuple[Any, Any]]:
        """Keys and values of a dictionary that is guarded as a whole, as if each was read by its place in it."""
        for place, (key, value) in node.get_key_value_managers().items():
            self._nodes += [node, key, value]
            if key is not None:
                yield _Item(place, is_key=True), key
            if value is not None:
                yield _Item(place, is_key=False), value


class _Item(NamedTuple):
    place: int
    is_key: bool


def _argument(accessor: Any) -> Any:
    """What an accessor reads by: a name, a key or a number; None where it says so in no way that is known."""
    if hasattr(accessor, "get_attr_name"):
        return accessor.get_attr_name()
    said = accessor.repr()
    inside = said[said.find("(") + 1 : said.rfind(")")]
    try:
        if inside.startswith("key="):
            return ast.literal_eval(inside[4:].partition(", framelocals_idx")[0])
        return ast.literal_eval(inside)
    except (SyntaxError, ValueError):
        return None


def _value_of(accessor: Any, value: Any) -> Any:
    """What an accessor finds in `value`; None where that is not known."""
    kind, name = type(accessor).__name__, _argument(accessor)
    if kind == "GetGenericDictGuardAccessor":
        return vars(value) if hasattr(value, "__dict__") else None
    if kind == "DictGetItemGuardAccessor" and isinstance(value, dict):
        return value.get(name)
    if kind == "GetAttrGuardAccessor":
        return getattr(value, "__dict__", {}).get(name)
    if kind == "ListGetItemGuardAccessor" and isinstance(value, list) and isinstance(name, int):
        return value[name] if name < len(value) else None
    return None


def _versions_of(objects: tuple[Any, ...]) -> Any:
    """Guards, for {"held": objects}, that each has the type it has now, and its dictionary the same version."""
    from torch._dynamo.guards import GuardManagerType

    root = torch._C._dynamo.guards.RootGuardManager()
    kind = GuardManagerType.GUARD_MANAGER
    whole = root.framelocals_manager(("held", 0), "held", objects, kind)
    whole.add_length_check_guard(len(objects), ["as many"], None)
    for i, one in enumerate(objects):
        item = whole.tuple_getitem_manager(i, f"held[{i}]", one, kind)
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
