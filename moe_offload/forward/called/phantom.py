"""`CalledPhantom`: the placeholder parameter of one expert that is not in use. It cannot be read.

A NaN would not do: its logits would be NaN too, and greedy decoding would make of that token 0 without a word. So
whatever computes with it raises, by name. What it looks like (shape, dtype, device, size) may be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...experts import Field, Place
from ..binding import refuse_through

#: Attributes that tell nothing of values and may be asked. `detach` is called by state_dict(), which then puts in the
#: real weights.
LOOKS = """shape dtype device layout requires_grad is_leaf is_meta ndim nbytes itemsize grad grad_fn is_cpu is_cuda
    is_sparse is_quantized is_nested _version""".split()
ASKED = """size dim numel nelement stride element_size is_floating_point is_complex is_shared is_contiguous data_ptr
    storage_offset untyped_storage get_device __len__ ndimension""".split()
_ALLOWED = {getattr(Tensor, name).__get__ for name in LOOKS} | {getattr(Tensor, name) for name in ASKED}
_ALLOWED |= {torch.numel, torch.is_floating_point, torch.is_complex, Tensor.requires_grad_}
_ALLOWED |= {getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")}  # as adapters and zero_grad do


class CalledPhantom(nn.Parameter):
    """Has the shape of a weight and the memory of one number."""

    called: str  # by its name in the model
    field: Field

    @staticmethod
    def of(place: Place, name: str, field: Field, device: torch.device) -> CalledPhantom:
        """The phantom of `place`, in the layer called `name`."""
        one = torch.full((), float("nan") if field.dtype.is_floating_point else 0, dtype=field.dtype, device=device)
        phantom = torch.Tensor._make_subclass(CalledPhantom, one.expand(place.tensor.shape), False)
        phantom.called, phantom.field = f"{name}.{place.key}", field
        return phantom

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.detach:
            return _phantom_in(args)
        _refuse(func, (args, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """TorchScript asks no `__torch_function__`."""
        refuse_through(lambda: _refuse(func, (args, kwargs or {})))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CalledPhantom({self.called}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _refuse(func: Callable[..., Any], values: Any) -> NoReturn:
    found = _phantom_in(values)
    whose, what = "an expert" if found is None else found.called, getattr(func, "__name__", str(func))
    raise UnsupportedModelError(
        f"{whose}: {what} reads the weights of an offloaded expert outside of its call; they are in memory only "
        "while the expert itself is called. Call the expert, or read them from model.state_dict()"
    )


def _phantom_in(values: Any) -> CalledPhantom | None:
    if isinstance(values, CalledPhantom):
        return values
    inner: Any = values.values() if isinstance(values, Mapping) else values
    if isinstance(values, (tuple, list, Mapping)):
        return next((found for one in inner if (found := _phantom_in(one)) is not None), None)
    return None
