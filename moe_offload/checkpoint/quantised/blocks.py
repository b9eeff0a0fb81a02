"""Blocks of FP8 scales that do not divide their matrix evenly: what the format means, and what transformers does.

The format has blocks of 128 x 128 and a short last one. transformers (5.23) does not read the size of a block, but
divides the matrix by the number of scales:

    rows  scales   transformers
    768   6        blocks of 128: as the format says
    32    1        one block of 32: the same weights as the format says
    576   5        an error: no such checkpoint can be loaded without a GPU (DeepSeek-V3 and R1, Kimi-K2: kv_a_proj)
    192   2        blocks of 96: other weights than were saved, without a word

The third kind is unpacked here by the format's meaning, and a warning says so; the fourth is refused, because what
plain transformers computes with such weights is not what was saved. Both concern dense weights; experts of either kind
are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ..headers import DTYPE_NAMES, Headers, TensorRange
from .quantizer import quantization_of

logger = logging.getLogger("moe_offload")
SCALES = "_scale_inv"  # behind the name of the weights
Block = tuple[int, int]


def block_of(config: Any) -> Block | None:
    """Rows and columns of a block, where a configuration says that weights are FP8 in blocks."""
    said = quantization_of(config)
    size = said.get("weight_block_size") if isinstance(said, Mapping) else getattr(said, "weight_block_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def check_blocks(config: Any, headers: Headers, experts: Collection[str]) -> None:
    """Raise `UnsupportedModelError` for weights that transformers would load wrongly, and for uneven experts."""
    block = block_of(config)
    if block is None:
        return
    for key, weight, scales in _in_blocks(headers):
        grid = _grid(block, weight)
        if scales.shape != grid:
            raise CheckpointError(
                f"{scales.file}: {key + SCALES!r} are {list(scales.shape)} scales for {list(weight.shape)} weights; "
                f"config.json says blocks of {list(block)}, of which there would be {list(grid)}. One of the two "
                "is another checkpoint's: put back what belongs together"
            )
    for key, weight, scales in _uneven(block, headers):
        divides = all(n % parts == 0 for n, parts in zip(weight.shape, scales.shape, strict=True))
        if divides or key in experts:
            what = (
                "transformers divides them evenly instead, and loads other weights than were saved"
                if divides
                else "transformers cannot load such experts"
            )
            raise UnsupportedModelError(
                f"{weight.file}: {key!r} is {list(weight.shape)} with {list(scales.shape)} scales for blocks of "
                f"{list(block)}, the last of them short; {what}. Use a checkpoint in bfloat16, or one whose "
                "sizes are multiples of the block"
            )


def unpack_uneven(config: Any, headers: Headers, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with the weights themselves where transformers cannot unpack their codes, and without their scales."""
    block, changed = block_of(config), dict(state)
    if block is None:
        return changed
    found = list(_uneven(block, headers))
    for key, weight, _ in found:
        scales = key + SCALES
        changed[key] = Unpacked(changed[key], changed.pop(scales), weight.shape, block)
    if found:
        logger.warning(
            "%d weights have a short last block of FP8 scales, such as %s; transformers cannot load them on a CPU, and "
            "they are unpacked as the format says",
            len(found), found[0][0],
        )  # fmt: skip
    return changed


class Unpacked:
    """An entry of a state dict, in place of the codes of a matrix: its weights, unpacked when they are asked for."""

    def __init__(self, codes: Any, scales: Any, shape: tuple[int, ...], block: Block):
        self._codes, self._scales, self.shape, self._block = codes, scales, shape, block
        self.dtype = torch.bfloat16

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.dtype]

    def __getitem__(self, where: Any) -> Tensor:
        codes, scales = self._codes[...].float(), self._scales[...].float()
        (rows, columns), (height, width) = codes.shape, self._block
        grown = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        whole: Tensor = (codes * grown).to(self.dtype)
        return whole[where]


def _uneven(block: Block, headers: Headers) -> Iterator[tuple[str, TensorRange, TensorRange]]:
    """Each FP8 matrix whose scales are those of blocks with a short last one, with its name."""
    for key, weight, scales in _in_blocks(headers):
        grid = _grid(block, weight)
        short = (parts > 1 and n % size for n, size, parts in zip(weight.shape, block, grid, strict=True))
        if scales.shape == grid and any(short):
            yield key, weight, scales


def _in_blocks(headers: Headers) -> Iterator[tuple[str, TensorRange, TensorRange]]:
    """Each FP8 matrix that has scales in two dimensions, with its name."""
    for key, weight in headers.items():
        scales = headers.get(key + SCALES)
        if weight.dtype == torch.float8_e4m3fn and len(weight.shape) == 2 and scales and len(scales.shape) == 2:
            yield key, weight, scales


def _grid(block: Block, weight: TensorRange) -> tuple[int, ...]:
    """How many blocks there are, the short ones too."""
    return tuple(-(-n // size) for n, size in zip(weight.shape, block, strict=True))
