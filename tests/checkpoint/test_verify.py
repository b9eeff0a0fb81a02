"""Our formulas beside transformers' operations, when a model is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_offload.checkpoint.outline import outline_folder
from moe_offload.checkpoint.quantised.verify import verify_unpacking
from moe_offload.experts import MoELayer
from tests.fakes.quantised_checkpoints import write


def test_weights_have_the_dtype_that_was_loaded_and_not_the_one_that_was_planned(tmp_path) -> None:
    """As experts of compressed-tensors, which stay in bfloat16 where dtype=float32 was asked for."""
    found = outline_folder(write("fp8", tmp_path / "model"))
    loaded = [_in_float32(moe) for moe in found.moe_layers]
    verified = verify_unpacking(loaded, found.index.packings, found.model, _zeros)
    assert {weight.dtype for moe in found.moe_layers for weight in moe.packed} == {torch.bfloat16}
    assert {weight.dtype for moe in verified for weight in moe.packed} == {torch.float32}


def _in_float32(moe: MoELayer) -> MoELayer:
    fields = tuple(replace(field, dtype=torch.float32) for field in moe.unpacked.fields)
    return replace(moe, unpacked=replace(moe.unpacked, fields=fields))


def _zeros(moe: MoELayer) -> torch.Tensor:
    return torch.zeros(moe.layout.row_bytes, dtype=torch.uint8)
