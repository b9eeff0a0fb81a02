"""compute="exact" on a CPU: products at memory speed, of few tokens or of all, with torch's bits.

    experts      `grouped_mm` of the experts' graphs asks our kernel first
    nn.Linear    its `forward` on the instance, as in `fast_products.py`, where the matrix is large

Where torch's order of sums is not known, or anything but a plain product of few rows is asked, torch computes. Weights
that rest packed see to themselves (`checkpoint/quantised/weights.py`).
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..experts import MoELayer
from ..forward.called.phantom import CalledPhantom
from ..forward.graphs.products import serve_few_rows
from ..packed import in_lanes
from ..packed.exact import FEW, LARGE, multiplier
from ..packed.exact_linear import MADE_UP, find_linear_order
from ..runtime.kernels.exact_rows import is_as_alone
from .fast_products import is_plain, is_unchanged

logger = logging.getLogger("moe_offload")

#: Elements of a matrix from which on our kernel pays where torch has several threads, and multiplies one row.
LARGE_OF_ONE_ROW = 1 << 22

#: What a program may have put in place of torch's own: then that is what it wants to be called.
FORWARD, LINEAR = nn.Linear.forward, functional.linear
MEETING = "_moe_offload_meeting"  # of a linear layer: what lets several calls share its products, while it does
MEETING_DIM = 3  # as a model calls its linear layers with one token: [1, 1, I]


def serve_exact(moe_layers: Iterable[MoELayer]) -> None:
    """Let the experts' graphs have such products, where a matrix is large enough to gain by them."""
    shapes: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    for moe in moe_layers:
        shapes[bool(getattr(moe.modules[0], "is_transposed", False))].update(_large_matrices(moe))
    if not any(shapes.values()):
        return
    try:
        from ..runtime.kernels import exact_rows
    except ImportError as error:  # numba, which was taken away or cannot be loaded
        logger.info("products of few tokens are torch's: numba cannot be used here: %s", error)
        return
    if exact_rows.try_products(*(sorted(each) for each in shapes.values())):
        serve_few_rows(exact_rows.multiply)


def sharpen_linears(model: nn.Module) -> list[nn.Linear]:
    """Give each linear layer that is large, in bfloat16, and changed by nobody, such a forward: those of experts that
    are called, too, whose weights come from a slot. Returns them."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_for_kernel(module)]
    for linear in linears:
        linear.__dict__["forward"] = types.MethodType(forward, linear)
    return linears


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """What replaces `nn.Linear.forward`."""
    if nn.Linear.forward is not FORWARD:
        replaced: Any = nn.Linear.forward
        return replaced(self, input)  # type: ignore[no-any-return]
    weight, bias = self.weight, self.bias
    if torch.compiler.is_dynamo_compiling() or functional.linear is not LINEAR or not is_plain(input, weight, bias):
        return functional.linear(input, weight, bias)
    x_MI, dense = input.view(-1, input.shape[-1]), _is_dense(input)
    order, with_lanes = None, in_lanes.linear_is_in_lanes(weight, bias is not None, input.dim(), is_slice=not dense)
    if not with_lanes and dense and len(x_MI) <= FEW:
        order = find_linear_order(weight, len(x_MI), bias is not None, input.dim())
    if not with_lanes and order is None:
        return functional.linear(input, weight, bias)
    meeting = vars(self).get(MEETING) if dense and input.dim() == MEETING_DIM else None
    if meeting is not None and (shared_MO := meeting.multiply(self, x_MI)) is not None:
        return shared_MO.view(*input.shape[:-1], -1)  # type: ignore[no-any-return]
    if with_lanes and len(x_MI) == 1 and weight.numel() < LARGE_OF_ONE_ROW and torch.get_num_threads() > 1:
        # It waits for memory in either case, and torch is called in a quarter of the time.
        return functional.linear(input, weight, bias)
    out_MO = x_MI.new_empty((len(x_MI), len(weight)))
    if order is None:
        in_lanes.multiply(x_MI, weight, out_MO, bias)
    else:
        multiplier()(x_MI, weight, out_MO, *order, bias)
    return out_MO.view(*input.shape[:-1], -1)


def multiply_rows(linear: nn.Linear, x_MI: Tensor) -> Tensor:
    """What a linear layer that calls meet at makes of some rows, each of which has the bits it has alone."""
    weight, bias = linear.weight, linear.bias
    out_MO = x_MI.new_empty((len(x_MI), len(weight)))
    if in_lanes.linear_is_in_lanes(weight, bias is not None, MEETING_DIM):
        in_lanes.multiply(x_MI, weight, out_MO, bias)
        return out_MO
    # Of one row alone, whatever torch does with more.
    order = find_linear_order(weight, 1, bias is not None, MEETING_DIM)
    if order is None:
        raise AssertionError("a linear layer whose order of sums is not known shares its products")
    for some_MI, some_MO in zip(x_MI.split(FEW), out_MO.split(FEW), strict=True):
        multiplier()(some_MI, weight, some_MO, *order, bias)
    return out_MO


def multiply_alone(linear: nn.Linear, x_1I: Tensor) -> Tensor:
    """What a call by itself gets of such a layer, by torch."""
    return functional.linear(x_1I[None], linear.weight, linear.bias)[0]


def rows_are_alike(moe: MoELayer, rows: int) -> bool:
    """Whether each of so many rows of the products of these experts has the bits it has alone, `each_as_alone`."""
    matrices = [field for field in moe.unpacked.fields if len(field.shape) == 2]
    plain = matrices and not moe.packed and moe.share is None and not getattr(moe.modules[0], "is_transposed", False)
    return bool(plain) and all(
        field.dtype == torch.bfloat16 and is_as_alone(field.shape[0], field.shape[1], rows) for field in matrices
    )


def _is_dense(input: Tensor) -> bool:
    """Whether strides are those of a new tensor. The last token of a prompt [1, 1, I] is contiguous too, but torch may
    multiply it by other functions than were tried."""
    step = 1
    for size, stride in zip(reversed(input.shape), reversed(input.stride()), strict=True):
        if stride != step:
            return False
        step *= size
    return True


def _is_for_kernel(linear: nn.Linear) -> bool:
    """Whether one row of it, as a model calls it, is added up in a known order."""
    weight, biased = linear.weight, linear.bias is not None
    if weight.numel() < LARGE:
        return False
    if isinstance(weight, CalledPhantom):
        if type(linear) is not nn.Linear or "forward" in vars(linear) or weight.field.dtype != torch.bfloat16:
            return False
        # What is like it in all that counts. An expert is called with rows [M, I].
        alike = torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
        in_order = alike.numel() <= MADE_UP and find_linear_order(alike, 1, biased, 2) is not None
        return in_order or in_lanes.linear_is_in_lanes(alike, biased, 2)
    if not is_unchanged(linear):
        return False
    return find_linear_order(weight, 1, biased, 3) is not None or in_lanes.linear_is_in_lanes(weight, biased, 3)


def _large_matrices(moe: MoELayer) -> list[tuple[int, int]]:
    """The shape of each weight of an expert that is a large bfloat16 matrix: [O, I], or [I, O] of a transposed one."""
    return [
        (field.shape[0], field.shape[1])
        for field in moe.layout.fields
        if len(field.shape) == 2 and field.dtype == torch.bfloat16 and field.shape[0] * field.shape[1] >= LARGE
    ]
