"""Make a packed matrix of an ordinary one: rounded to the nearest code, and lossy; the opposite of a format's `unpack`.

    mxfp4   of two powers of two, the one with the smaller error       int4   of two scales likewise
    fp8     the largest number of a block becomes 448

Shapes: O outputs and I inputs of the matrix, G groups of one row, J columns of a group. The tensors come as they lie in
a checkpoint of the format, codes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .formats import AT_ONCE, powers_of_two
from .mxfp4 import GROUP, VALUES

FP8_MAX = 448.0  # the largest number of e4m3
#: Where the eight magnitudes of MXFP4 part. A number half way goes to the code that is even: down, unless it is moved.
_HALF_WAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_GOES_UP = (0.75, 1.75, 3.5)

Packed = tuple[Tensor, Tensor]


def quantise_mxfp4(w_OI: Tensor) -> Packed:
    """Codes uint8 [O, G, 16] and scales uint8 [O, G], for groups of 32 columns. I is a multiple of 32."""
    return _in_strips(w_OI, 1, _quantise_mxfp4)


def quantise_int4(w_OI: Tensor, group: int = GROUP) -> Packed:
    """Codes int32 [O, I/8] and scales [O, G] in the dtype of `w_OI`. `group` is a multiple of 8 that divides I."""
    return _in_strips(w_OI, 1, lambda strip: _quantise_int4(strip, group))


def quantise_fp8(w_OI: Tensor, block: tuple[int, int] = (128, 128)) -> Packed:
    """Codes float8_e4m3fn [O, I] and scales float32 [O / rows, I / columns]. `block` divides the matrix."""
    return _in_strips(w_OI, block[0], lambda strip: _quantise_fp8(strip, block))


def _in_strips(w_OI: Tensor, unit: int, quantise: Callable[[Tensor], Packed]) -> Packed:
    """Some rows at a time, whose float32 copies stay in the cache."""
    parts = [quantise(strip) for strip in _strips(w_OI, unit)]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _strips(w_OI: Tensor, unit: int) -> Iterator[Tensor]:
    outputs, inputs = w_OI.shape
    step = max(AT_ONCE // inputs // unit, 1) * unit
    for begin in range(0, outputs, step):
        yield w_OI[begin : begin + step]


def _quantise_mxfp4(w_OI: Tensor) -> Packed:
    x_OGJ = w_OI.to(torch.float32).unflatten(1, (-1, GROUP))
    # The largest number of a group is m * 2^e with m in [0.5, 1): it lies between 4 and 8 times 2^(e - 3).
    low = torch.frexp(x_OGJ.abs().amax(-1)).exponent.clamp(min=-124) - 3
    half_way = torch.tensor(_HALF_WAY)
    for up in _GOES_UP:
        at = _HALF_WAY.index(up)
        half_way[at] = torch.nextafter(half_way[at], torch.tensor(0.0))
    values = torch.tensor(VALUES[:8])

    def try_out(scales_OG: Tensor) -> tuple[Tensor, Tensor]:
        by = powers_of_two(scales_OG)[..., None]
        codes = torch.bucketize((x_OGJ.abs() / by).contiguous(), half_way)
        return codes, values[codes] * by

    scales, codes = _better(x_OGJ.abs(), [(low + 127).to(torch.uint8), (low + 128).to(torch.uint8)], try_out)
    codes = codes.to(torch.uint8) | (torch.signbit(x_OGJ).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales


def _quantise_int4(w_OI: Tensor, group: int) -> Packed:
    x_OGJ = w_OI.to(torch.float32).unflatten(1, (-1, group))
    largest, smallest = x_OGJ.amax(-1), x_OGJ.amin(-1)
    whole = torch.maximum(largest / 7, -smallest / 8)  # nothing is cut off
    finer = torch.maximum(largest, -smallest) / 7.5  # the largest number may be, by half a step

    def try_out(scales_OG: Tensor) -> tuple[Tensor, Tensor]:
        by = scales_OG.to(torch.float32)[..., None]
        codes = torch.round(x_OGJ / by).clamp(-8, 7)
        return codes, codes * by

    candidates = [scale.to(w_OI.dtype) for scale in (whole, finer)]
    candidates = [torch.where(scale == 0, 1, scale) for scale in candidates]  # all zeros, or too small for the dtype
    scales, codes = _better(x_OGJ, candidates, try_out)
    nibbles = (codes + 8).to(torch.uint8).flatten(1)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(torch.int32), scales


def _quantise_fp8(w_OI: Tensor, block: tuple[int, int]) -> Packed:
    height, width = block
    x = w_OI.to(torch.float32).unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [so, height, si, width]
    scales = x.abs().amax((1, 3)) / FP8_MAX
    scales = torch.where(scales == 0, 1, scales)
    codes = (x / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view(w_OI.shape), scales


def _better(
    x_OGJ: Tensor, candidates: list[Tensor], try_out: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Of two scales for each group the one whose numbers are nearer (the first, where both are as near); its codes."""
    (one, other), tried = candidates, [try_out(scales) for scales in candidates]
    first, second = ((x_OGJ - numbers).square().sum(-1) for _, numbers in tried)
    wins = second < first
    return torch.where(wins, other, one), torch.where(wins[..., None], tried[1][0], tried[0][0])
