"""`gated_mm` as one Triton kernel: `indexed_mm` of gate and up, which lie one behind the other in a matrix, and what
becomes of the two, in one launch.

Shapes: P token-expert pairs, S slots, H hidden, I inner: a matrix has I rows of the gate, then I of up.

Both sums are rounded to the dtype of x before they meet, as if they had been written and read again; and silu is the
expression that Inductor writes for it, in its own functions. So the bits are those of two launches.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .indexed_triton import tile_of

HAS_LIBDEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


def gated_mm(x_PH: Tensor, weight_SMH: Tensor, slots_P: Tensor) -> Tensor:
    """`silu(gate) * up`, [P, I], of `[gate, up] = weight[slots[p]] @ x[p]`; sums in float32. The weight [S, 2I, H] may
    be any view."""
    pairs, hidden = x_PH.shape
    _, rows, columns = weight_SMH.shape
    if hidden != columns or len(slots_P) != pairs or rows % 2:
        raise ValueError(f"x {[*x_PH.shape]} and {len(slots_P)} slots do not fit gated weights {[*weight_SMH.shape]}")
    inner = rows // 2
    out_PI = torch.empty(pairs, inner, dtype=x_PH.dtype, device=x_PH.device)
    tile = tile_of(weight_SMH)
    _gated_mm[(triton.cdiv(inner, tile.rows), pairs)](
        x_PH,
        weight_SMH,
        slots_P,
        out_PI,
        inner,
        hidden,
        *x_PH.stride(),
        *weight_SMH.stride(),
        slots_P.stride(0),
        BLOCK_I=tile.rows,
        BLOCK_H=tile.columns,
        num_warps=tile.warps,
    )
    return out_PI


@triton.jit
def _gated_mm(
    x_PH,
    weight_SMH,
    slots_P,
    out_PI,
    I,  # noqa: E741
    H,
    x_stride_p,
    x_stride_h,
    stride_s,
    stride_m,
    stride_h,
    slots_stride,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    p = tl.program_id(1)
    slot = tl.load(slots_P + p * slots_stride).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    gate_I = weight_SMH + slot * stride_s + i.to(tl.int64) * stride_m
    up_I = weight_SMH + slot * stride_s + (i + I).to(tl.int64) * stride_m
    gates_IH = tl.zeros([BLOCK_I, BLOCK_H], tl.float32)
    ups_IH = tl.zeros([BLOCK_I, BLOCK_H], tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        x_H = tl.load(x_PH + p * x_stride_p + h * x_stride_h, mask=h < H, other=0.0).to(tl.float32)
        inside = (i < I)[:, None] & (h < H)[None, :]
        at_H = h[None, :].to(tl.int64) * stride_h
        gates_IH += tl.load(gate_I[:, None] + at_H, mask=inside, other=0.0).to(tl.float32) * x_H[None, :]
        ups_IH += tl.load(up_I[:, None] + at_H, mask=inside, other=0.0).to(tl.float32) * x_H[None, :]
    dtype = out_PI.dtype.element_ty
    gate = tl.sum(gates_IH, 1).to(dtype).to(tl.float32)
    up = tl.sum(ups_IH, 1).to(dtype).to(tl.float32)
    exp = libdevice.exp(-gate) if HAS_LIBDEVICE else tl.exp(-gate)
    tl.store(out_PI + p * I + i, (gate / (exp + 1.0) * up).to(dtype), mask=i < I)
