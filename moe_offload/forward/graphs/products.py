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

from ...runtime.kernels import Kernels

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

PRODUCT_PER_PAIR = 64  # up to so many pairs, each has a product of its own: 8 sequences of 8 experts


def serve_products(kernels: Kernels) -> None:
    """On CUDA, let matrix products go through kernels that ask the host nothing: one for the few pairs of a decode
    step, the same with a gate, and one for those of a prompt."""
    few, many, gated = kernels.indexed_mm, kernels.grouped_mm, kernels.gated_mm

    def grouped_mm(x_P: Tensor, weight_S: Tensor, slots_P: Tensor) -> Tensor:
        if len(x_P) <= PRODUCT_PER_PAIR:
            return few(x_P, weight_S.transpose(1, 2), slots_P)
        return many(x_P, weight_S, slots_P)

    def gated_mm(x_P: Tensor, weight_S: Tensor, slots_P: Tensor) -> Tensor:
        return gated(x_P, weight_S.transpose(1, 2), slots_P)

    if not torch._C._dispatch_has_kernel_for_dispatch_key("moe_offload::grouped_mm", "CUDA"):
        ops.serve_product("grouped_mm", grouped_mm, "CUDA")
        ops.serve_product("gated_mm", gated_mm, "CUDA")
        for name, product in packed_products(kernels).items():
            ops.serve_product(name, product, "CUDA")


def packed_products(kernels: Kernels) -> dict[str, Callable[..., Tensor]]:
    """The ops of weights that lie packed, by kernels that ask the host nothing. A weight that those cannot read is
    unpacked matrix by matrix, as the host is told the slots: the passes put no such weight into a graph that is to be
    recorded."""

    def packed_mm(x_P: Tensor, bank: Tensor, slots_P: Tensor, weight: int, transposed: bool) -> Tensor:
        codes = ops.packed_weight(weight).row_codes(transposed)
        if codes is None:
            return ops.run_packed_mm(x_P, bank, slots_P, weight, transposed)
        multiply = kernels.packed_indexed_mm if len(x_P) <= PRODUCT_PER_PAIR else kernels.packed_grouped_mm
        return multiply(x_P, bank.view(torch.uint8), slots_P, codes)

    def packed_gated_mm(x_P: Tensor, bank: Tensor, slots_P: Tensor, weight: int, transposed: bool) -> Tensor:
        codes = ops.packed_weight(weight).row_codes(transposed)
        if codes is None:
            return ops.run_packed_gated_mm(x_P, bank, slots_P, weight, transposed)
        return kernels.packed_gated_mm(x_P, bank.view(torch.uint8), slots_P, codes)

    def unpack(bank: Tensor, slots_P: Tensor, weight: int) -> Tensor:
        packed, rows_SB = ops.packed_weight(weight), bank.view(torch.uint8)
        out_P = bank.new_empty((len(slots_P), *packed.shape), dtype=packed.dtype)
        for i, out in enumerate(out_P):
            packed.unpack(rows_SB.index_select(0, slots_P[i : i + 1])[0], out)
        return out_P

    return {"packed_mm": packed_mm, "packed_gated_mm": packed_gated_mm, "unpack": unpack}


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
