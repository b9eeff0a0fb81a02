"""A kept step need not look up the model's parameters: they are the ones that it found when it was kept.

The code that Dynamo has made of a step walks to each of some 600 parameters, for 48 layers 4800 instructions:

    before   model._modules["model"]._modules["layers"]._modules["0"]._parameters["weight"], ...
    after    the parameter itself, a constant of the code

A step is run only while every dictionary on these ways has the version that it had (`kept.py`), so both are the same
object. What is walked to from arguments, such as the tensors of a KV cache, is looked up as before.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

logger = logging.getLogger("moe_offload")
NOT_KNOWN = object()
LOADS = ("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW")
SUBSCRIPT = 26  # which operator that is: NB_SUBSCR
FOLLOWED = (*LOADS, "STORE_FAST", "DELETE_FAST")


class _GraphCalled(BaseException):
    """Raised in place of a graph: `given` is what it was called with."""

    def __init__(self, given: tuple[Any, ...]):
        self.given = given


def with_known_arguments(
    run: FunctionType, args: tuple[Any, ...], kwargs: Mapping[str, Any], graph: str, steady: Iterable[Any]
) -> Callable[..., Any]:
    """`run`, a function made by Dynamo, with constants for what it finds by way of `steady` objects alone: those that
    have, and are given, no other attributes or items. It begins at what it closes over, of which only those attributes
    count that are `steady` themselves.

    The result calls the graph, which Dynamo names `graph` and a number, with the very same objects; where that is not
    so (another version of Python or torch, say), `run` itself is returned.
    """
    held = {id(one) for one in steady}
    cells = {
        name: cell.cell_contents for name, cell in zip(run.__code__.co_freevars, run.__closure__ or (), strict=True)
    }
    try:
        code = _put_constants(run.__code__, cells, held)
        known = _same_function(run, code, run.__globals__)
        before, after = (_find_given(one, args, dict(kwargs), graph) for one in (run, known))
        if len(before) == len(after) and all(x is y for x, y in zip(before, after, strict=True)):
            return known
    except Exception:
        logger.debug("decode steps look up their parameters at each of them", exc_info=True)
    return run


def _same_function(run: FunctionType, code: CodeType, names: dict[str, Any]) -> FunctionType:
    made = FunctionType(code, names, run.__name__, run.__defaults__, run.__closure__)
    made.__kwdefaults__ = run.__kwdefaults__
    return made


def _find_given(run: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any], graph: str) -> tuple[Any, ...]:
    """What `run` calls its graph with. Nothing is computed."""

    def called(*given: Any) -> Any:
        raise _GraphCalled(given)

    names = dict(run.__globals__)
    names |= dict.fromkeys((name for name in names if name.startswith(graph)), called)
    try:
        _same_function(run, run.__code__, names)(*args, **kwargs)
    except _GraphCalled as found:
        return found.given
    raise ValueError("no graph was called")


def _put_constants(code: CodeType, cells: Mapping[str, Any], held: set[int]) -> CodeType:
    """`code`, in which what is reached from `cells` through `held` objects is loaded as it is.

    Only from its beginning to the first instruction that jumps, or that is jumped to.
    """
    from torch._dynamo.bytecode_transformation import transform_code_object

    def transform(instructions: list[Any], _: dict[str, Any]) -> None:
        targets = {id(one.target) for one in instructions if one.target is not None}
        end = next((i for i, one in enumerate(instructions) if one.target is not None or id(one) in targets), None)
        rest = [] if end is None else instructions[end:]
        others = [*rest, *(one for one in instructions[:end] if one.opname not in FOLLOWED)]
        written = {one.argval for one in instructions if one.opname == "STORE_DEREF"}
        read_only = {name: value for name, value in cells.items() if name not in written}
        walk = _Walk(read_only, held, kept={name for one in others if "FAST" in one.opname for name in _names(one)})
        for one in instructions[:end]:
            walk.step(one)
        walk.load_pending()
        instructions[:] = walk.made + rest

    return transform_code_object(code, transform)[0]


def _load(value: Any) -> Any:
    """Code that loads `value`. Only tensors: constants of code are not seen by Python's search for garbage, and what
    leads to the model would keep it."""
    from torch._dynamo.bytecode_transformation import create_load_const

    if not isinstance(value, Tensor):
        raise ValueError(f"a {type(value).__name__} is used by itself, and is no tensor")
    return create_load_const(value, checked=False)


def _names(one: Any) -> tuple[Any, ...]:
    """The local names of an instruction."""
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


class _Walk:
    """Follows straight code. What is known and on top of the stack is `pending`: it is loaded once it is needed there,
    by the code that did so where that was one instruction.

    `made` is the new code, `kept` the local names that the code behind it reads.
    """

    def __init__(self, cells: Mapping[str, Any], held: set[int], kept: set[str]):
        self._cells, self._held, self._kept = cells, held, kept
        self._pending: list[tuple[Any, Any]] = []  # each with the instruction that loads it, if there is one
        self._locals: dict[str, tuple[Any, Any]] = {}
        self.made: list[Any] = []

    def step(self, one: Any) -> None:
        name, arg = one.opname, one.argval
        if name == "LOAD_DEREF" and arg in self._cells:
            self._pending.append((self._cells[arg], one))
        elif name == "LOAD_CONST":
            self._pending.append((arg, one))
        elif name in LOADS and arg in self._locals:
            self._pending.append(self._locals[arg])
        elif self._pending and name == "LOAD_ATTR" and (found := self._attribute(one)) is not NOT_KNOWN:
            self._pending[-1] = found, None
        elif len(self._pending) > 1 and _is_subscript(one) and (found := self._item()) is not NOT_KNOWN:
            self._pending[-2:] = [(found, None)]
        elif self._pending and (name == "DUP_TOP" or (name == "COPY" and one.arg == 1)):
            self._pending.append(self._pending[-1])
        elif self._pending and name == "STORE_FAST":
            self._locals[arg] = self._pending.pop()
            if arg in self._kept:
                self._load(*self._locals[arg])
                self.made.append(one)
        elif name == "DELETE_FAST" and arg in self._locals and arg not in self._kept:
            del self._locals[arg]
        else:
            self._emit(one)

    def load_pending(self) -> None:
        for value, instruction in self._pending:
            self._load(value, instruction)
        self._pending.clear()

    def _load(self, value: Any, instruction: Any) -> None:
        self.made.append(_load(value) if instruction is None else copy.copy(instruction))

    def _emit(self, one: Any) -> None:
        self.load_pending()
        self.made.append(one)
        if "FAST" in one.opname:
            for name in _names(one):
                self._locals.pop(name, None)

    def _attribute(self, one: Any) -> Any:
        """What an attribute of the topmost value is, if that is held and has it in its dictionary."""
        if sys.version_info >= (3, 12) and one.arg is not None and one.arg & 1:  # a method's
            return NOT_KNOWN
        value, _ = self._pending[-1]
        if isinstance(value, dict):  # whose content is held, and no attribute
            return NOT_KNOWN
        found = getattr(value, "__dict__", {}).get(one.argval, NOT_KNOWN)
        if any(value is root for root in self._cells.values()):
            return found if id(found) in self._held else NOT_KNOWN
        return found if id(value) in self._held else NOT_KNOWN

    def _item(self) -> Any:
        (container, _), (key, _) = self._pending[-2:]
        return container.get(key, NOT_KNOWN) if type(container) is dict and id(container) in self._held else NOT_KNOWN


def _is_subscript(one: Any) -> bool:
    """Python 3.14 has it among its operators of two operands."""
    return bool(one.opname == "BINARY_SUBSCR" or (one.opname == "BINARY_OP" and one.arg == SUBSCRIPT))
