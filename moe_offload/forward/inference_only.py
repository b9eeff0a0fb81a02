"""Outputs of an offloaded model require gradients where those of the plain model would; a backward then says why not.

A model's forward records nothing for autograd. If its outputs simply required no gradient, a loss that is a sum of
several terms would train without the model's term, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import OffloadError
from .graphs.ops import refuse_backward_of_experts


class _Refused(torch.autograd.Function):
    """The values as they are; a backward through them raises."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], args: tuple[Any, ...], *differentiable: Tensor) -> Any:
        return run(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_gradients()


def refuse_gradients() -> NoReturn:
    raise OffloadError(
        "an offloaded model is for inference only: neither its experts nor what goes through them has gradients. "
        "Train the model before optimize(), or take a plain copy for what needs gradients"
    )


refuse_backward_of_experts(refuse_gradients)


def refuse_backward(run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)`, one tensor, without gradients; a backward through it raises if one of `args` requires them."""
    return _Refused.apply(run, args, *(x for x in args if isinstance(x, Tensor)))  # type: ignore[no-untyped-call]


def needs_gradients(model: nn.Module, inputs: Iterable[Any]) -> bool:
    """Whether the outputs of the plain model would require gradients."""
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in (*inputs, *model.parameters()) if isinstance(x, Tensor))


def refuse_backward_of(output: Any) -> Any:
    """`output`, a model's; a backward through any of its tensors raises. (What a KV cache holds stays as it is.)"""
    return _mark_tensors(output, torch.empty(0, requires_grad=True, device="cpu"))


def _mark_tensors(one: Any, probe: Tensor) -> Any:
    if isinstance(one, Tensor):
        return _Refused.apply(_view_same, (one,), probe) if one.is_floating_point() else one  # type: ignore[no-untyped-call]
    if type(one) in (tuple, list):
        return type(one)(_mark_tensors(inner, probe) for inner in one)
    if isinstance(one, dict):  # as a ModelOutput is
        for key, inner in list(one.items()):
            one[key] = _mark_tensors(inner, probe)
    return one


def _view_same(x: Tensor) -> Tensor:
    return x.view_as(x)
