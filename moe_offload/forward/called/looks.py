"""Tensors that look like weights and have no elements: what they may be asked, and who may compute with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..binding import refuse_through

#: What is true of a row without its elements: properties, and methods.
LOOKS = "shape dtype device layout ndim requires_grad is_leaf grad_fn grad itemsize nbytes is_cpu is_cuda is_meta"
LOOKS += " is_mps is_xpu is_sparse is_quantized is_nested _version"
ASKED = "size dim numel nelement stride is_contiguous element_size is_floating_point is_complex __len__ ndimension"
ASKED += " get_device is_shared"
METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in LOOKS.split()] + [getattr(Tensor, name) for name in ASKED.split()]
)


def name_of(func: Any) -> str:
    """'linear', '__getitem__'; of a property its name: 'T'."""
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name == "__get__" else name


def run_on_looks(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], refuse: Callable[[str], NoReturn]
) -> Any:
    """`func` on what has looks and no elements, where this package asks it to. TorchScript, which asks no
    `__torch_function__`, would compute with elements that are nobody's."""
    if torch._C._is_torch_function_enabled():
        refuse_through(lambda: refuse(name_of(func)))
    with torch._C._DisableTorchDispatch():
        return func(*args, **kwargs)
