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
from .looks import METADATA, answer_looks, refuse_looks

#: What may be asked beside looks: by state_dict(), which then puts in the real weights (as after `detach`), and by
#: adapters and zero_grad().
_ALLOWED = METADATA | {Tensor.data_ptr, Tensor.storage_offset, Tensor.untyped_storage, Tensor.requires_grad_}
_ALLOWED |= {getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")}


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
            return answer_looks(func, tuple(args), dict(kwargs or {}), whole=True)
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
        refuse_looks(lambda _: _refuse(func, (args, kwargs or {})), func)

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
