"""Quantise a matrix: each weight is rounded to the nearest value of a format, and the result is the format's tensors.

This loses precision, so it is done only where a user asks for it. What was rounded once stays: quantising what is
unpacked gives the same tensors again.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .formats import powers_of_two
from .mxfp4 import GROUP, VALUES

LARGEST_FP8 = 448.0
LEAST_EXPONENT, MOST_EXPONENT = 0, 254
#: The middles between neighbouring magnitudes of MXFP4. A weight on one goes to the even code: up at every other one.
MIDDLES = [(low + high) / 2 for low, high in pairwise(VALUES[:8])]


def quantise_mxfp4(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks uint8 [O, G, 16] and scales uint8 [O, G].

    The largest magnitude of a group is between 4 and 8 under the smaller of two scales, and between 2 and 4 under the
    other, which is taken where it loses less: the largest value is 6.
    """
    values_OGJ = _groups(w_OI, GROUP)
    _, exponent = torch.frexp(values_OGJ.abs().amax(-1))  # the largest is in [1/2, 1) * 2^exponent
    nothing = (values_OGJ == 0).all(-1)
    small = torch.where(nothing, 127, (exponent - 3 + 127).clamp(LEAST_EXPONENT, MOST_EXPONENT)).to(torch.uint8)
    large = (small.int() + ~nothing).clamp(max=MOST_EXPONENT).to(torch.uint8)
    losses, codes = zip(*(_nearest(values_OGJ, scales) for scales in (small, large)), strict=True)
    larger = losses[1] < losses[0]
    code_OGJ = torch.where(larger[..., None], codes[1], codes[0])
    return code_OGJ[..., ::2] | (code_OGJ[..., 1::2] << 4), torch.where(larger, large, small)


def quantise_fp8(w_OI: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [O, I] and scales float32 [O / block, I / block]: its largest weight becomes 448."""
    outputs, inputs = w_OI.shape
    if outputs % block or inputs % block:
        raise UnsupportedModelError(
            f"a matrix of {outputs} x {inputs} is not cut into blocks of {block}: plain transformers would give the "
            "scales to other rows. Use MXFP4 or int4 for this model, or a block that divides both"
        )
    blocks = w_OI.float().reshape(outputs // block, block, inputs // block, block)
    # Rounded to bfloat16, as it is when it is unpacked: so the scale is the same the next time.
    largest = blocks.abs().amax((1, 3)).to(torch.bfloat16).float()
    scale = torch.where(largest == 0, 1.0, largest / LARGEST_FP8)
    codes = (blocks / scale[:, None, :, None]).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return codes.view(outputs, inputs), scale


def quantise_int4(w_OI: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Codes int32 [O, I / 8] and scales bfloat16 [O, I / group].

    The weight of the largest magnitude is -8 times the scale, which is negative where that weight is positive: so all
    sixteen values are used, and that weight comes back as it was.
    """
    values_OGJ = _groups(w_OI, group)
    largest = values_OGJ.gather(-1, values_OGJ.abs().argmax(-1, keepdim=True))
    scale_OG1 = torch.where(largest == 0, 1.0, largest / -8).to(torch.bfloat16)
    codes = (values_OGJ / scale_OG1.float()).round().clamp(-8, 7).to(torch.int32) + 8
    nibbles = codes.view(w_OI.shape[0], -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return nibbles.sum(-1, dtype=torch.int32), scale_OG1[..., 0]


def _groups(w_OI: Tensor, group: int) -> Tensor:
    outputs, inputs = w_OI.shape
    if inputs % group or group % 8:
        raise UnsupportedModelError(
            f"a matrix of {outputs} x {inputs} is not cut into groups of {group} columns: the group must be a multiple "
            "of 8 that divides the columns"
        )
    return w_OI.float().reshape(outputs, inputs // group, group)


def _nearest(values_OGJ: Tensor, scales_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Squared loss of each group under these scales, and the codes."""
    power = powers_of_two(scales_OG)[..., None]
    bounds, values = (torch.tensor(some, device=values_OGJ.device) for some in (MIDDLES, VALUES))
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros_like(bounds[1::2]))
    magnitude = values_OGJ.abs() / power
    code = torch.bucketize(magnitude, bounds)
    loss = (values[code] - magnitude).mul(power).square().sum(-1)
    return loss, (code | (torch.signbit(values_OGJ).long() << 3)).to(torch.uint8)
