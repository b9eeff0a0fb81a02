"""Tensors that look like weights and have no elements: what they may be asked, and who may compute with them.

Where this package computes with them it says so (`as_looks`). Anybody else comes to their `__torch_function__`, or,
where that is not asked (TorchScript, DisableTorchFunctionSubclass), to their `__torch_dispatch__`, which refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..binding import refuse_through

#: What is true of a row without its elements: properties, and methods.
LOOKS = "shape dtype device layout ndim requires_grad is_leaf grad_fn grad itemsize nbytes is_cpu is_cuda is_meta"
LOOKS += " is_mps is_xpu is_sparse is_quantized is_nested _version"
ASKED = "size dim numel nelement element_size is_floating_point is_complex __len__ ndimension get_device is_shared"
#: How elements would lie. Of a stand-in for a whole weight they lie on top of each other.
LAYOUT = frozenset((Tensor.stride, Tensor.is_contiguous))
METADATA = LAYOUT.union(
    (getattr(Tensor, name).__get__ for name in LOOKS.split()), (getattr(Tensor, name) for name in ASKED.split())
)
METADATA |= {torch.numel, torch.is_floating_point, torch.is_complex}
#: What gives the tensor itself where it is of that kind already, and else a copy.
CASTS = frozenset("to type float bfloat16 half double".split())
#: What gives a view where the elements lie so that there is one, and else a copy.
RESHAPES = frozenset("reshape flatten contiguous".split())


def as_looks() -> AbstractContextManager[object]:
    """While it is entered, tensors without elements are computed with as they are."""
    both = contextlib.ExitStack()
    both.enter_context(torch._C.DisableTorchFunctionSubclass())
    both.enter_context(torch._C._DisableTorchDispatch())
    return both


def name_of(func: Any) -> str:
    """'linear', '__getitem__'; of a property its name: 'T'."""
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name == "__get__" else name


def is_write(name: str) -> bool:
    """Whether a function of that name changes its first argument."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delete__") or (
            name.startswith("__i") and name not in ("__invert__", "__index__", "__int__", "__iter__")
        )
    return name.endswith("_")


def answer_looks(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool = False) -> Any:
    """What one of METADATA says. `whole`: it stands for a whole weight, which is contiguous."""
    with torch._C.DisableTorchFunctionSubclass():
        if whole and func in LAYOUT:
            args = (lay_out(args[0]), *args[1:])
        return func(*args, **kwargs)


def lay_out(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, without memory: what the real weight is like."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def casts(tensor: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `func`, of CASTS, would change dtype or device, or copy for another reason."""
    probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return func(probe, *args, **kwargs) is not probe


def copies(name: str, tensor: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `func`, of that name, would make a copy of `tensor`, as large as it is: found out without making one."""
    if name in CASTS:
        return casts(tensor, func, args, kwargs)
    if name not in RESHAPES:
        return False
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    made = func(empty, *args, **kwargs)
    return bool(made.untyped_storage()._cdata != empty.untyped_storage()._cdata)


def refuse_looks(refuse: Callable[[str], NoReturn], func: Callable[..., Any]) -> NoReturn:
    """For `__torch_dispatch__`: nobody asked whether there are elements, and those there are nobody's."""
    refuse_through(lambda: refuse(name_of(func)))
