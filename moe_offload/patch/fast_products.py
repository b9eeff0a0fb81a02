"""compute="fast": products of few tokens at memory speed, in the experts' graphs and in dense linear layers.

    experts      the passes put `fast_grouped_mm` in place of `grouped_mm`, which is served here
    nn.Linear    its `forward` on the instance, so hooks, adapters and wrappers around it act as before

A linear layer computes as ever where anything but a plain bfloat16 product of few rows is asked: gradients, autocast, a
trace, a mode, a subclass of tensors, another dtype. `restore_linears` takes everything off again.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from ..forward.graphs import products

logger = logging.getLogger("moe_offload")

#: The most rows of a fast product. With more, torch is as fast: it uses each weight that it reads from memory often
#: enough.
FEW_TOKENS = 4
PLAIN = (Tensor, nn.Parameter)


def serve_fast(device: str, implementation: str) -> bool:
    """Let graphs have fast products. False, and said once, where `device` or what is installed has none."""
    kernels = _kernels() if device == "cpu" else None
    if kernels is None:
        if device != "cpu":
            _say_once(f"compute='fast' is for a CPU; on {device} products are exact")
        return False
    if implementation == "batched_mm":
        _say_once("compute='fast': experts by batched_mm stay exact, since each pair copies its matrix; use grouped_mm")
    products.serve_fast_products(kernels.can_multiply, kernels.multiply_grouped)
    return True


def speed_up_linears(model: nn.Module) -> list[nn.Linear]:
    """Give every bfloat16 linear layer on a CPU, that nothing else has changed, a fast forward. Returns them."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and is_unchanged(module)]
    for linear in linears:
        # A bound method: a copy of the module gets one of its own, where a closure would multiply with our weights.
        linear.__dict__["forward"] = types.MethodType(forward, linear)
    return linears


def restore_linears(linears: Iterable[nn.Linear]) -> None:
    """Take our forward off again, where nobody has put another in its place."""
    for linear in linears:
        own = getattr(vars(linear).get("forward"), "__func__", None)
        if own is not None and own.__module__.startswith(__package__):
            del linear.__dict__["forward"]


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """What replaces `nn.Linear.forward`."""
    if (
        torch.compiler.is_dynamo_compiling()
        or input.numel() > FEW_TOKENS * self.weight.shape[1]
        or not is_plain(input, self.weight, self.bias)
    ):
        return functional.linear(input, self.weight, self.bias)
    out: Tensor = _kernels().multiply_rows(input.view(-1, input.shape[-1]), self.weight, self.bias)
    return out.view(*input.shape[:-1], -1)


def is_unchanged(module: nn.Linear) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return _is_matrix(module.weight) and _is_plain(module.bias)


def _is_matrix(weight: Tensor) -> bool:
    """Whether the kernel takes such a weight."""
    outputs, inputs = weight.shape
    return _is_plain(weight) and weight.is_contiguous() and inputs % 2 == 0 and outputs >= 4


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or (
        type(tensor) in PLAIN
        and tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_neg()
    )


def is_plain(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is a bfloat16 product and nothing else: no gradient, autocast, trace, mode or subclass."""
    inputs = weight.shape[1]
    return (
        type(input) is Tensor
        and input.numel() > 0
        and input.shape[-1:] == (inputs,)
        and _is_plain(input)
        and input.is_contiguous()
        and _is_matrix(weight)
        and (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias)))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


@cache
def _kernels() -> Any:
    """The compiled kernels; None, with a warning, where there are none. Imported late: numba takes a
    second to import."""
    try:
        from ..runtime.kernels import few_rows

        few_rows.compile_kernels()
    except (ImportError, RuntimeError) as error:
        logger.warning(
            "compute='fast' needs numba (pip install numba), which cannot be used here: %s. Products are exact", error
        )
        return None
    return few_rows


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)
