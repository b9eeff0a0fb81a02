"""Which kernels compute the matrix products of rewritten graphs: on CUDA ours, which never need the host; on a CPU, if
compute="fast", those of `runtime/kernels/few_rows.py`.

Shapes: P token-expert pairs, S slots, H hidden, O outputs of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from passes import ops
from passes.grouped import Run, find_runs

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

PRODUCT_PER_PAIR = 64  # up to so many pairs, each has a product of its own: 8 sequences of 8 experts


def serve_products(few: Product, many: Product, gated: Product) -> None:
    """On CUDA, let matrix products go through kernels that ask the host nothing: `few` (x [P, H], weight [S, O, H],
    slots [P]) for the pairs of a decode step, `gated` for the same with a gate, `many` (x [P, H], weight [S, H, O],
    slots [P]) for those of a prompt."""

    def grouped_mm(x_P: Tensor, weight_S: Tensor, slots_P: Tensor) -> Tensor:
        if len(x_P) <= PRODUCT_PER_PAIR:
            return few(x_P, weight_S.transpose(1, 2), slots_P)
        return many(x_P, weight_S, slots_P)

    def gated_mm(x_P: Tensor, weight_S: Tensor, slots_P: Tensor) -> Tensor:
        return gated(x_P, weight_S.transpose(1, 2), slots_P)

    if not torch._C._dispatch_has_kernel_for_dispatch_key("moe_offload::grouped_mm", "CUDA"):
        ops.serve_product("grouped_mm", grouped_mm, "CUDA")
        ops.serve_product("gated_mm", gated_mm, "CUDA")


def serve_few_rows(multiply: Callable[[Tensor, Tensor, Sequence[Run], Tensor], Sequence[Run]]) -> None:
    """On a CPU, let the products of the runs of equal slots go through `multiply` (x [P, H], weight [S, H, O], runs,
    out [P, O]), which gives the bits of torch.mm, and returns those that it leaves to that."""

    def grouped_mm(x_P: Tensor, weight_S: Tensor, slots_P: Tensor) -> Tensor:
        out_PO = x_P.new_empty((x_P.shape[0], weight_S.shape[2]))
        for slot, begin, end in multiply(x_P, weight_S, list(find_runs(slots_P.tolist())), out_PO):
            torch.mm(x_P[begin:end], weight_S[slot], out=out_PO[begin:end])
        return out_PO

    if not torch._C._dispatch_has_kernel_for_dispatch_key("moe_offload::grouped_mm", "CPU"):
        ops.serve_product("grouped_mm", grouped_mm, "CPU")


def serve_fast_products(takes: Callable[[Tensor, Tensor], bool], multiply: Product) -> None:
    """On a CPU, let `fast_grouped_mm` go through `multiply` (x [P, H], weight [S, O, H], slots [P]) where it `takes`
    such tensors; elsewhere it is the exact product."""

    def fast_grouped_mm(x_P: Tensor, weight_S: Tensor, slots_P: Tensor) -> Tensor:
        weight_SOH = weight_S.transpose(1, 2)
        if takes(x_P, weight_SOH):
            return multiply(x_P, weight_SOH, slots_P)
        exact: Tensor = ops.grouped_mm(x_P, weight_S, slots_P)
        return exact

    if not torch._C._dispatch_has_kernel_for_dispatch_key("moe_offload::fast_grouped_mm", "CPU"):
        ops.serve_product("fast_grouped_mm", fast_grouped_mm, "CPU")
