"""Our formulas beside transformers' operations, when a model is loaded."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import moe_offload
from moe_offload.apps.families.session import run_session
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.checkpoint.pretrained.arguments import Arguments
from moe_offload.checkpoint.quantised import verify
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


def test_what_compressed_tensors_leaves_in_bfloat16_is_planned_so(tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    for kind, dtype in {"ct-int4": torch.bfloat16, "ct-mxfp4": torch.bfloat16, "ct-fp8": torch.float32}.items():
        folder = write(kind, tmp_path / kind)
        planned = outline_folder(folder, Arguments(dtype="float32")).moe_layers
        with moe_offload.from_pretrained(folder, "1GB", dtype="float32").moe_offload as handle:
            for before, after in zip(planned, handle.moe_layers, strict=True):
                assert [(weight.dtype, weight.workspace_bytes) for weight in before.packed] == [
                    (dtype, weight.workspace_bytes) for weight in after.packed
                ]


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "ct-int4", "ct-fp8"])
def test_a_weight_that_transformers_unpacks_keeps_no_model(kind: str, tmp_path, monkeypatch) -> None:
    """Graphs know the weights that they were made for as long as the process lives."""
    if kind.startswith("ct"):
        pytest.importorskip("compressed_tensors")
    monkeypatch.setattr(verify, "_agrees", lambda *_: False)
    folder = write(kind, tmp_path / kind)
    model = moe_offload.from_pretrained(folder, "1GB", config={"compile": "graph"})
    run_session(model, "lm", new_tokens=2)
    packed = [weight for moe in model.moe_offload.moe_layers for weight in moe.packed]
    assert {type(weight).__name__ for weight in packed} == {"ConvertedWeight"}
    dense = weakref.ref(model.lm_head.weight)
    model.moe_offload.close()
    del model
    gc.collect()
    assert dense() is None
    row = torch.zeros(1 << 20, dtype=torch.uint8)
    packed[0].unpack(row, torch.empty(packed[0].shape, dtype=packed[0].dtype))


def _in_float32(moe: MoELayer) -> MoELayer:
    fields = tuple(replace(field, dtype=torch.float32) for field in moe.unpacked.fields)
    return replace(moe, unpacked=replace(moe.unpacked, fields=fields))


def _zeros(moe: MoELayer) -> torch.Tensor:
    return torch.zeros(moe.layout.row_bytes, dtype=torch.uint8)
