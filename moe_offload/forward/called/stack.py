"""`Stack`: what an offloaded module has in place of a stack of experts `[E, ...]` that its code indexes by a number.

    W[3], W[ids[0]], W[e, :, :n]         the row of one expert (`row.py`), as of W.select(0, e)
    for w in W;  W.unbind();  W.chunk(E) the rows of all, each read when it is used
    W.view(-1, F, H)[e]                  of a stack [E*F, H]: the same
    W.shape, W.dtype, W.device           as of the real one

Anything else raises, and names the module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import RoutingError, UnsupportedModelError
from ...experts import Field
from .looks import CASTS, METADATA, answer_looks, as_looks, casts, lay_out, name_of, refuse_looks
from .row import ExpertRow, Source

#: What gives the same stack under another shape, or as another object.
ITSELF = frozenset("detach data alias".split())
SAME = CASTS | ITSELF | frozenset("view reshape unflatten contiguous".split())
#: What gives its rows, one by one.
APART = frozenset("unbind __iter__ chunk split tensor_split".split())


class Stack(nn.Parameter):
    """`[count, *field.shape]`, or all of it with the experts joined in the first dimension `[count * n, ...]`."""

    source: Source
    field: Field
    row: Tensor  # one row's looks: its elements are never read
    count: int
    per_expert: bool  # whether its first dimension is that of experts

    @staticmethod
    def of(source: Source, field: Field, like: Tensor, row: Tensor) -> Stack:
        """In place of `like`. `row` looks like the share of one expert."""
        joined = tuple(like.shape[1:]) != field.shape
        empty = row[:1] if joined else row[None]
        count = like.shape[0] // field.shape[0] if joined else like.shape[0]
        return _made(empty.expand(like.shape), source, field, row, count)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return answer_looks(func, args, kwargs, whole=True)
        stack, name = next((each for each in args if isinstance(each, Stack)), None), name_of(func)
        if stack is None or args[0] is not stack:
            _refuse(stack or _anywhere(args, kwargs), name)
        return _read(stack, name, func, args[1:], kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        refuse_looks(lambda name: _refuse(_anywhere(args, kwargs or {}), name), func)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with as_looks():
            return f"{self.field.name} of {self.source.name}, offloaded, {tuple(self.shape)} {self.dtype}"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse(self, "deepcopy")


def _made(empty: Tensor, source: Source, field: Field, row: Tensor, count: int) -> Stack:
    with torch._C._DisableTorchDispatch():  # it may be a stack, which it detaches
        stack = Tensor._make_subclass(Stack, empty, False)
    stack.source, stack.field, stack.row, stack.count = source, field, row, count
    stack.per_expert = tuple(empty.shape[1:]) == field.shape
    return stack


def _read(stack: Stack, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    per_expert = stack.per_expert
    if name == "__getitem__" and per_expert:
        index, rest = (args[0][0], args[0][1:]) if isinstance(args[0], tuple) and args[0] else (args[0], ())
        expert = _number(index)
        if expert is not None:
            row: Tensor = _row(stack, expert)
            row = row if _is_scalar(index) else row.unsqueeze(0)
            return row[rest if _is_scalar(index) else (slice(None), *rest)] if rest else row
    elif name == "select" and per_expert and args[:1] == (0,) and len(args) == 2:
        return _row(stack, operator.index(args[1]))
    elif name in APART and per_expert:
        rows = _rows(stack, name, func, args, kwargs)
        if rows is not None:
            return rows
    elif name in SAME:
        same = _same(stack, name, func, args, kwargs)
        if same is not None:
            return same
    _refuse(stack, name)


def _same(stack: Stack, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stack again, in the shape that `func` gives it; None where that is another, or a copy."""
    with as_looks():
        shape = tuple(stack.shape)
        if name in CASTS:
            if casts(stack, func, args, kwargs):
                return None
        elif name not in ITSELF:
            shape = tuple(func(lay_out(stack), *args, **kwargs).shape)
        if shape not in ((stack.count, *stack.field.shape), tuple(stack.shape)):
            return None
        split = shape == (stack.count, *stack.field.shape)
        empty = (stack.row[None] if split else stack.row[:1]).expand(shape)
    return _made(empty, stack.source, stack.field, stack.row, stack.count)


def _number(index: Any) -> int | None:
    """The one expert that an index names: 3, ids[0], ids[:1]; None if it is another kind of index."""
    if isinstance(index, bool) or (isinstance(index, Tensor) and (index.is_floating_point() or index.numel() != 1)):
        return None
    if isinstance(index, Tensor) and (index.dtype == torch.bool or index.dim() > 1):
        return None
    try:
        return int(index.item()) if isinstance(index, Tensor) else operator.index(index)
    except TypeError:
        return None


def _is_scalar(index: Any) -> bool:
    return not isinstance(index, Tensor) or index.dim() == 0


def _row(stack: Stack, expert: int) -> ExpertRow:
    if not -stack.count <= expert < stack.count:
        raise RoutingError(
            f"{stack.source.name}: expert {expert} was asked for, but {stack.field.name} has experts "
            f"0..{stack.count - 1}; the model's routing code or its configuration is damaged"
        )
    return ExpertRow.of(stack.row, stack.source, stack.field.name, expert % stack.count)


def _rows(stack: Stack, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each expert's row as an iterator, or in a tuple; None where `func` takes the stack apart in another way."""
    with as_looks():
        pieces = tuple(func(stack, *args, **kwargs))
    shapes = {tuple(piece.shape) for piece in pieces}
    if len(pieces) != stack.count or shapes not in ({stack.field.shape}, {(1, *stack.field.shape)}):
        return None
    rows: list[Tensor] = [_row(stack, e) for e in range(stack.count)]
    if shapes != {stack.field.shape}:
        rows = [row.unsqueeze(0) for row in rows]
    return iter(rows) if name == "__iter__" else tuple(rows)


def _anywhere(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stack:
    waiting: list[Any] = [*args, *kwargs.values()]
    for value in waiting:
        if isinstance(value, Stack):
            return value
        waiting += value if isinstance(value, (tuple, list)) else []
    raise AssertionError("a function of stacks was given none")


def _refuse(stack: Stack, name: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{stack.source.name}: {name} was asked of {stack.field.name}, whose experts are offloaded. The model's code "
        "can read one expert of it at a time, by a number (W[e]), and nothing else"
    )
