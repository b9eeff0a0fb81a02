"""Which of Dynamo's guards may go, because what they read is held otherwise: a search of their tree.

A guard goes only if it is of a known kind and what it reads is held so; all else stays. What no version tells is left
as it is with Dynamo: a class's attributes are read once more, and its methods are watched (`dynamo.py`).
"""

from __future__ import annotations

import ast
import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Guards of a value that is itself held. Constants cannot change; a version, a type and a tensor's facts are compared.
HELD = {"TYPE_MATCH", "ID_MATCH", "DICT_CONTAINS", "DICT_LENGTH", "NO_HASATTR", "NOT_NONE", "LENGTH_CHECK"}
#: Guards of tensors. (A mark for dynamic sizes decides what is compiled, and nothing that is computed.)
OF_TENSORS = {"TENSOR_MATCH", "DIMENSION_DYNAMIC_MARKING_GUARD", "NO_TENSOR_ALIASING", "NO_HASATTR"}
CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
COUNTED = (list, set, frozenset, deque)  # no version tells what is in one, whatever its attributes are
MODULE_PARTS = ("_parameters", "_buffers", "_modules")


class Search:
    """Which nodes of a tree of guards may go: all that they and those below them read is held.

    `left_out` are the ids of these nodes. In their place are to be held, by id, `objects` and `tensors`; `parts` of the
    model itself, by name; the tensors that layers of the cache have, `layer_tensors`, by layer and name; and what is
    read of classes, `of_classes`.
    """

    def __init__(self, model: nn.Module, steady_layers: Mapping[int, Any]):
        self.model = model
        self.left_out: set[int] = set()
        self.objects: dict[int, Any] = {}
        self.tensors: dict[int, Tensor] = {}
        self.parts: dict[str, Any] = {name: vars(model)[name] for name in MODULE_PARTS}
        self.layer_tensors: dict[tuple[int, str], None] = {}
        self.of_classes: dict[tuple[type, str], Any] = {}
        self._of_layer = {id(layer): i for i, layer in steady_layers.items()}
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
        """The model's own dictionary changes with each `generate`; what guards read of it is held one by one."""
        for accessor, below in self._children(node):
            if type(accessor).__name__ != "GetGenericDictGuardAccessor":
                continue
            for inner, part in self._children(below):
                name = _argument(inner)
                if type(inner).__name__ == "DictGetItemGuardAccessor" and name in vars(self.model):
                    self.parts[name] = vars(self.model)[name]
                    self._visit(part, self.parts[name])

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
            covered = kinds <= HELD and not isinstance(value, COUNTED)
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
        if isinstance(value, dict) and kind != "DictGetItemGuardAccessor":
            return False  # its content is held, and no attribute
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
