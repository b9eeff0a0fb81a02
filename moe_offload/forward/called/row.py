"""`ExpertRow`: one expert's weight as the model's code holds it, read when it is used and not before.

    w = self.gate_up_proj[e]         an ExpertRow: a shape, and whose it is; nothing is read
    y = linear(x, w)                 the row of expert e is made resident, and the product computed with its slot
    y = linear(x[:0], w)             no element is computed, so nothing is read

A slot is another expert's as soon as that one is asked for, so no view of a slot leaves here: a view of a row is a row
again, which asks anew when it is used. What cannot be answered so raises, and names the module: never NaN, which argmax
turns into a token without a word.

Its own elements are nobody's: they are computed with only where the result has no element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from ...errors import UnsupportedModelError
from ..inference_only import refuse_backward_of
from .looks import METADATA, answer_looks, as_looks, copies, is_write, name_of, refuse_looks

#: What may be a view of a row. Whether it is one is seen: a dtype that changes is a copy.
VIEWS = frozenset(
    "view reshape transpose permute t swapaxes swapdims movedim unsqueeze squeeze flatten unflatten expand narrow "
    "select chunk split tensor_split unbind detach contiguous to type float bfloat16 half double T mT data __getitem__ "
    "__iter__ alias".split()
)
#: Products of two matrices. What they give is never a view.
PRODUCTS = frozenset("linear matmul __matmul__ __rmatmul__ mm".split())
#: What hands the memory itself to somebody who does not ask again.
ESCAPES = frozenset(
    "data_ptr untyped_storage storage numpy __array__ __dlpack__ _cdata __cuda_array_interface__ share_memory_ "
    "__reduce_ex__ __deepcopy__ requires_grad_ register_hook".split()
)


class Source(Protocol):
    """What the rows of one layer ask when they are used."""

    name: str

    def entered(self) -> AbstractContextManager[object]:
        """While it is entered, what was taken stays where it is."""

    def take(self, expert: int, field: str, tokens: int) -> Mapping[str, Tensor]:
        """The weights of `expert` by field, until another one is taken. `tokens`: how many rows they are used for."""


class Step(NamedTuple):
    """One view of a row: `function(row, *args, **kwargs)`, and of several results the one at `pick`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pick: int | None

    def take(self, tensor: Tensor) -> Tensor:
        out = self.function(tensor, *self.args, **self.kwargs)
        return cast(Tensor, out if self.pick is None else tuple(out)[self.pick])


class ExpertRow(Tensor):
    """The `field` of `expert` of a layer, seen through `steps`."""

    source: Source
    field: str
    expert: int
    steps: tuple[Step, ...]

    @staticmethod
    def of(empty: Tensor, source: Source, field: str, expert: int, steps: tuple[Step, ...] = ()) -> ExpertRow:
        """`empty` has its shape and dtype, and no element that counts."""
        with torch._C._DisableTorchDispatch():  # it may be a row, which it detaches
            row = Tensor._make_subclass(ExpertRow, empty)
        row.source, row.field, row.expert, row.steps = source, field, expert, steps
        return row

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return answer(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        refuse_looks(next(iter(find_rows((args, kwargs or {})))).refuse, func)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with as_looks():
            return f"{self.field} of expert {self.expert} of {self.source.name}, {tuple(self.shape)} {self.dtype}"

    def refuse(self, name: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.source.name}: {name} was asked of the {self.field} of expert {self.expert}, whose weights pass "
            "through slots; the model's code can compute with them and take views, and nothing else"
        )


def answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, some of whose arguments are rows."""
    if func in METADATA:
        return answer_looks(func, args, kwargs)
    name = name_of(func)
    if name in PRODUCTS and not kwargs and not torch.is_grad_enabled():
        out = _multiply(func, args)
        if out is not None:
            return out
    rows = list(find_rows((args, kwargs)))
    _refuse_writes(name, rows, args, kwargs)
    alone = len(rows) == 1 and bool(args) and args[0] is rows[0]
    if alone and name in VIEWS:
        views = _view(rows[0], name, func, args, kwargs)
        if views is not None:
            return views
    if _is_empty((args, kwargs)):
        with as_looks():
            out = func(*args, **kwargs)
        made = list(_tensors(out))
        if made and not any(each.numel() for each in made):
            return out
    return _compute(func, args, kwargs, rows)


def _multiply(func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
    """What `_compute` gives, in a fifth of the time, where one of `args` is a row and another hidden states; else
    None. Nearly all that code does with a row is this, and what is looked for elsewhere cannot be there."""
    row, x = args[1], args[0]
    if type(row) is not ExpertRow:
        row, x = x, row
    plain = type(x) is Tensor or type(x) is Parameter
    if type(row) is not ExpertRow or not plain or not x.numel() or any(each is not None for each in args[2:]):
        return None
    with row.source.entered():
        weight = row.source.take(row.expert, row.field, x.numel() // x.shape[-1] if x.dim() else 1)[row.field]
        for step in row.steps:
            weight = step.take(weight)
        out: Tensor = func(weight, x) if args[0] is row else func(x, weight)
    return out


def _view(row: ExpertRow, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The row, or the rows, that are views of `row`; None if the result is none."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():  # as_looks(), in half the time
        if copies(name, row, func, args[1:], kwargs):
            return None
        out = func(*args, **kwargs)
        several = not isinstance(out, Tensor)
        found = tuple(out) if several else (out,)
        home = row.untyped_storage().data_ptr()
        if not all(isinstance(each, Tensor) and each.untyped_storage().data_ptr() == home for each in found):
            return None
        rows = [
            ExpertRow.of(each, row.source, row.field, row.expert, (*row.steps, Step(func, args[1:], kwargs, pick)))
            for each, pick in zip(found, range(len(found)) if several else [None], strict=True)
        ]
    if not several:
        return rows[0]
    return iter(rows) if name == "__iter__" else type(out)(rows)


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: list[ExpertRow]) -> Any:
    first, tokens = rows[0], _tokens(args)
    cut = torch.is_grad_enabled() and any(x.requires_grad for x in _tensors((args, kwargs)))
    with first.source.entered(), torch.no_grad():
        if all(row.source is first.source and row.expert == first.expert for row in rows):
            held = first.source.take(first.expert, first.field, tokens)
            real = {id(row): _seen(row, held[row.field]) for row in rows}
        else:  # one after the other: together they may not fit the slots
            real = {id(row): _copy(row, tokens) for row in rows}
        out = func(*_swap(args, real), **_swap(kwargs, real))
    homes = {tensor.untyped_storage().data_ptr() for tensor in real.values()}
    if any(each.untyped_storage().data_ptr() in homes for each in _tensors(out)):
        first.refuse(name_of(func))
    return refuse_backward_of(out) if cut else out


def find_rows(values: Any) -> Iterable[ExpertRow]:
    """The rows among arguments, however they are nested."""
    if isinstance(values, ExpertRow):
        yield values
    elif isinstance(values, dict):
        yield from find_rows(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from find_rows(value)


def _swap(values: Any, found: dict[int, Tensor]) -> Any:
    if isinstance(values, ExpertRow):
        return found[id(values)]
    if isinstance(values, dict):
        return {key: _swap(value, found) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_swap(value, found) for value in values)
    return values


def _seen(row: ExpertRow, tensor: Tensor) -> Tensor:
    for step in row.steps:
        tensor = step.take(tensor)
    return tensor


def _copy(row: ExpertRow, tokens: int) -> Tensor:
    with row.source.entered():
        return _seen(row, row.source.take(row.expert, row.field, tokens)[row.field]).clone()


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _is_empty(values: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether something that is computed with has no elements."""
    args, kwargs = values
    plain = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and not isinstance(each, ExpertRow)]
    return any(not each.numel() for each in plain)


def _tokens(args: tuple[Any, ...]) -> int:
    """How many rows are multiplied with the weight: what the policy hears of."""
    plain = [each for each in args if isinstance(each, Tensor) and not isinstance(each, ExpertRow) and each.dim()]
    return max((each.numel() // each.shape[-1] for each in plain if each.numel()), default=1)


def _refuse_writes(name: str, rows: list[ExpertRow], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    written = list(find_rows(kwargs.get("out")))
    if args and isinstance(args[0], ExpertRow) and name in ESCAPES:
        written.append(args[0])
    if is_write(name) or kwargs.get("inplace"):
        written += find_rows(args[:1])
    if written:
        written[0].refuse(name)
