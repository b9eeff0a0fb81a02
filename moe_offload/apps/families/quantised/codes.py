"""Weights as the tensors of each format, as real checkpoints have them: what stands in a file for X.weight.

Rounding is crude: which weights come out is of no matter, only what reading them gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Parts = dict[str, Tensor]  # the end of a tensor's name -> tensor
Quantise = Callable[[Tensor], Parts]

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 128


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., O, I] -> codes uint8 [..., O, I/2], the first of a pair low, and exponents uint8 [..., O, I/32]."""
    groups = weight.float().unflatten(-1, (-1, 32))
    power = (groups.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2).clamp(-127, 127)
    codes = (groups / power.exp2()[..., None])[..., None].sub(FP4).abs().argmin(-1).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (power + 127).to(torch.uint8)


def fp8_blocks(weight: Tensor, scale: str = "float32") -> Parts:
    rows, columns = weight.shape
    grid = [(n + BLOCK - 1) // BLOCK for n in weight.shape]
    grown = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
    grown[:rows, :columns] = weight.float()
    blocks = grown.view(grid[0], BLOCK, grid[1], BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    if scale != "float32":
        scales = scales.log2().ceil().exp2()
    codes = (blocks / scales[:, None, :, None]).view_as(grown)[:rows, :columns].to(torch.float8_e4m3fn)
    kept = {"float32": scales, "e8m0": scales.to(torch.float8_e8m0fnu)}[scale]
    return {"weight": codes, "weight_scale_inv": kept}


def fp8_tensor(weight: Tensor) -> Parts:
    scale = weight.float().abs().max() / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def mxfp8(weight: Tensor) -> Parts:
    groups = weight.float().unflatten(-1, (-1, 32))
    power = (groups.abs().amax(-1) / 448).log2().ceil().clamp(-127, 127)
    codes = (groups / power.exp2()[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return {"weight": codes, "weight_scale_inv": (power + 127).to(torch.uint8)}


def fp4_experts(weight: Tensor) -> Parts:
    """As DeepSeek-V4 has them: scales are called X.scale, not X.weight_scale_inv."""
    codes, scales = to_mxfp4(weight)
    return {"weight": codes.view(torch.int8), "scale": scales.view(torch.float8_e8m0fnu)}


def fp4_dense(weight: Tensor) -> Parts:
    parts = fp8_blocks(weight, "e8m0")
    return {"weight": parts["weight"], "scale": parts["weight_scale_inv"]}


def int4(weight: Tensor, shape_dtype: torch.dtype = torch.int64) -> Parts:
    groups = weight.float().unflatten(-1, (-1, 32))
    scales = (groups.abs().amax(-1) / 7.5).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).int().flatten(-2) + 8
    words = (codes.unflatten(-1, (-1, 8)) << (4 * torch.arange(8, dtype=torch.int32))).sum(-1).to(torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape, dtype=shape_dtype),
    }


def fp8_channel(weight: Tensor) -> Parts:
    scale = (weight.float().abs().amax(-1, keepdim=True) / 448).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}


def ct_mxfp4(weight: Tensor) -> Parts:
    codes, scales = to_mxfp4(weight)
    return {"weight_packed": codes, "weight_scale": scales}
