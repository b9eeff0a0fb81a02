"""Which tensors a quantised format writes in place of an expert matrix, and what config.json then says of them.

    format  experts in the file      layout, which plain transformers loads too
    mxfp4   stacked [E, I, O]        gpt-oss: gate_up_proj_blocks [E, O, G, 16], gate_up_proj_scales [E, O, G]
    mxfp4   one tensor each [O, I]   compressed-tensors: weight_packed U8 [O, I/2], weight_scale U8 [O, G]
    int4    one tensor each          compressed-tensors: weight_packed I32 [O, I/8], weight_scale [O, G], weight_shape
    fp8     one tensor each          weight F8_E4M3 [O, I], weight_scale_inv F32 [O / block, I / block]

Only experts are quantised. The configuration lists every other nn.Linear as left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...experts import MoELayer
from ...packed.formats import AT_ONCE
from ...packed.mxfp4 import GROUP
from ...packed.quantise import quantise_fp8, quantise_int4, quantise_mxfp4
from ..headers import Headers, TensorRange
from ..row_index import RowIndex
from ..shards import Entry

KINDS = ("mxfp4", "int4", "fp8")
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16  # of FP8: what kernels expect, and what is still worth a scale


@dataclass(frozen=True)
class ExpertMatrix:
    """The tensor `key` of the ordinary checkpoint: one matrix [O, I], or stacked ones [E, I, O]."""

    key: str
    range: TensorRange

    @property
    def stacked(self) -> bool:
        return len(self.range.shape) == 3

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (
            (self.range.shape[2], self.range.shape[1]) if self.stacked else (self.range.shape[0], self.range.shape[1])
        )


@dataclass(frozen=True)
class Layout:
    """A format and its tensors, `stacked` or one for each expert; `block`: rows and columns of a block (FP8)."""

    kind: str
    stacked: bool
    block: int = LARGEST_BLOCK

    def entries(self, matrix: ExpertMatrix) -> list[Entry]:
        """What is written in place of a matrix."""
        (outputs, inputs), stem = matrix.shape, matrix.key.removesuffix(".weight")
        groups = inputs // GROUP
        if self.stacked:
            of = matrix.range.shape[0], outputs, groups
            return [_entry(f"{stem}_blocks", torch.uint8, *of, 16), _entry(f"{stem}_scales", torch.uint8, *of)]
        if self.kind == "fp8":
            grid = outputs // self.block, inputs // self.block
            codes = _entry(f"{stem}.weight", torch.float8_e4m3fn, outputs, inputs)
            return [codes, _entry(f"{stem}.weight_scale_inv", torch.float32, *grid)]
        if self.kind == "mxfp4":
            codes = _entry(f"{stem}.weight_packed", torch.uint8, outputs, inputs // 2)
            return [codes, _entry(f"{stem}.weight_scale", torch.uint8, outputs, groups)]
        codes = _entry(f"{stem}.weight_packed", torch.int32, outputs, inputs // 8)
        scales = _entry(f"{stem}.weight_scale", torch.bfloat16, outputs, groups)
        return [codes, scales, _entry(f"{stem}.weight_shape", torch.int64, 2)]

    def quantise(self, w_OI: Tensor) -> list[Tensor]:
        """The tensors of one matrix, in the order of `entries`."""
        strips = [self._quantise_strip(strip) for strip in w_OI.split(max(AT_ONCE // w_OI.shape[1], 1) * self._unit)]
        codes, scales = (torch.cat(parts) for parts in zip(*strips, strict=True))
        if self.kind == "int4":
            return [codes, scales, torch.tensor(w_OI.shape, device="cpu")]
        return [codes.flatten(1) if self.kind == "mxfp4" and not self.stacked else codes, scales]

    @property
    def _unit(self) -> int:
        """Rows of a matrix that are quantised together."""
        return self.block if self.kind == "fp8" else 1

    def _quantise_strip(self, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "fp8":
            return quantise_fp8(w_OI, self.block)
        return quantise_mxfp4(w_OI) if self.kind == "mxfp4" else quantise_int4(w_OI)

    def configuration(self, model: nn.Module, moe_layers: Sequence[MoELayer]) -> dict[str, Any]:
        """The quantization_config."""
        left_alone = dense_linears(model, moe_layers)
        if self.stacked:
            return {"quant_method": "mxfp4", "modules_to_not_convert": left_alone}
        if self.kind == "fp8":
            said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
            return {**said, "weight_block_size": [self.block, self.block], "modules_to_not_convert": left_alone}
        weights: dict[str, Any] = {
            "num_bits": 4, "type": "int" if self.kind == "int4" else "float", "strategy": "group", "group_size": GROUP,
            "symmetric": True, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
            "observer_kwargs": {},
        }  # fmt: skip
        group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
        return {
            "config_groups": {"group_0": group}, "ignore": left_alone, "kv_cache_scheme": None,
            "format": "pack-quantized" if self.kind == "int4" else "mxfp4-pack-quantized",
            "quant_method": "compressed-tensors", "quantization_status": "compressed",
        }  # fmt: skip


def find_matrices(moe_layers: Sequence[MoELayer], index: RowIndex, headers: Headers) -> dict[str, ExpertMatrix]:
    """Every expert matrix of an ordinary checkpoint, by its key. Biases are no matrices, and stay as they are."""
    starts = {(found.file, found.offset): key for key, found in headers.items() if found.nbytes}
    matrices: dict[str, ExpertMatrix] = {}
    for moe in moe_layers:
        for row in index.rows[moe.index]:
            for source in (source for piece in row if len(piece.field.shape) == 2 for source in piece.sources):
                key = starts.get((source.file, source.offset))
                if key is not None and key not in matrices:  # None: a later expert's slice of a stack seen before
                    matrices[key] = ExpertMatrix(key, headers[key])
    return matrices


def choose_layout(kind: str, matrices: Mapping[str, ExpertMatrix], where: str) -> Layout:
    """Raises `UnsupportedModelError` where the format has no layout for such experts, or their sizes do not divide."""
    found = list(matrices.values())
    stacked = any(matrix.stacked for matrix in found)
    alike = all(matrix.stacked == stacked for matrix in found)
    named = alike and (kind == "mxfp4" if stacked else all(matrix.key.endswith(".weight") for matrix in found))
    if not named:
        raise UnsupportedModelError(
            f"{where}: its experts lie in the file as {found[0].key!r} {list(found[0].range.shape)}, and transformers "
            f"has no {kind} layout for that: fp8 and int4 need a tensor NAME.weight for each expert and projection, "
            "and mxfp4 that or stacked ones alone. Use another format, or the checkpoint as it is"
        )
    if kind == "fp8":
        block = math.gcd(LARGEST_BLOCK, *(size for matrix in found for size in matrix.shape))
        if block < SMALLEST_BLOCK:
            raise UnsupportedModelError(
                f"{where}: the sizes of its experts have no block in common but {block} by {block}, too small to be "
                f"worth a scale (at least {SMALLEST_BLOCK}). Use mxfp4 or int4, or the checkpoint as it is"
            )
        return Layout(kind, stacked, block)
    uneven = next((matrix for matrix in found if matrix.shape[1] % GROUP), None)
    if uneven is not None:
        raise UnsupportedModelError(
            f"{where}: {uneven.key!r} has {uneven.shape[1]} inputs, which are no whole groups of {GROUP}, as {kind} "
            "has them. Use fp8, or the checkpoint as it is"
        )
    return Layout(kind, stacked)


def dense_linears(model: nn.Module, moe_layers: Sequence[MoELayer]) -> list[str]:
    """The names of all nn.Linear that are not inside experts."""
    inside = tuple(f"{name}." for moe in moe_layers for name in moe.names)
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and not name.startswith(inside)]


def _entry(key: str, dtype: torch.dtype, *shape: int) -> Entry:
    return Entry(key, dtype, shape, math.prod(shape) * dtype.itemsize)
