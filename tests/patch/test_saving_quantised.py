"""A quantised model saved: the weights it computes with, as an ordinary checkpoint; and packed anew."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload.apps.families.quantised.kinds import KINDS
from moe_offload.apps.families.session import run_session
from moe_offload.checkpoint.folder import INDEX
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.errors import CheckpointChangedError, CheckpointError, ConfigError, SaveError
from tests.fakes.quantised_checkpoints import rewrite, tensors_of, write

SETTINGS = {"compile": "graph", "poison": True}
SAVED = ("mxfp4", "fp8", "ct-fp8")
KINDS_SAVED = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            bool(KINDS[kind].needs) and importlib.util.find_spec(KINDS[kind].needs) is None, reason="needs a package"
        ),
    )
    for kind in SAVED
]


def load_ours(folder: Path):
    return moe_offload.from_pretrained(folder, "2GB", config=SETTINGS)


def run(model) -> list[torch.Tensor]:
    return run_session(model, "lm", new_tokens=3)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS_SAVED)
def test_saved_is_an_ordinary_checkpoint_of_the_same_weights(kind: str, tmp_path: Path) -> None:
    """transformers itself writes one that cannot be loaded, or fails."""
    model = load_ours(write(kind, tmp_path / "quantised"))
    want, state = run(model), model.state_dict()
    before = model.config.to_dict()
    model.save_pretrained(tmp_path / "saved")
    assert model.config.to_dict() == before
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "saved").values()} <= {torch.bfloat16, torch.float32}
    plain, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", experts_implementation="grouped_mm", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert_same(run(plain), want)
    assert_same(run(load_ours(tmp_path / "saved")), want)


@pytest.mark.parametrize(("kind", "shard"), [*((kind, "1GB") for kind in SAVED), ("mxfp4", "300KB")])
def test_saved_packed_are_the_tensors_that_came(kind: str, shard: str, tmp_path: Path) -> None:
    """And transformers and moe_offload load the same model from them."""
    if KINDS[kind].needs:
        pytest.importorskip(KINDS[kind].needs)
    folder, out = write(kind, tmp_path / "quantised"), tmp_path / "saved"
    model = load_ours(folder)
    want, state, before = run(model), model.state_dict(), model.config.to_dict()
    model.save_pretrained(out, packed=True, max_shard_size=shard)
    assert model.config.to_dict() == before
    assert len(list(out.glob("*.safetensors"))) == 1 if shard == "1GB" else (out / INDEX).is_file()
    came, saved = tensors_of(folder), tensors_of(out)
    assert {key: (t.dtype, t.shape) for key, t in saved.items()} == {key: (t.dtype, t.shape) for key, t in came.items()}
    assert [key for key in came if not torch.equal(as_bytes(came[key]), as_bytes(saved[key]))] == []
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, out)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    plain = AutoModelForCausalLM.from_pretrained(out, experts_implementation="grouped_mm")
    assert_same(run(plain), want)  # in which compressed-tensors unpacks dense weights
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    ours = load_ours(out)
    assert all(moe.packed for moe in ours.moe_offload.moe_layers)
    assert_same(run(ours), want)
    assert_same(run(model), want)


def test_saved_packed_over_an_older_checkpoint(tmp_path: Path) -> None:
    """Nothing of that is left, and what it had is used by nobody."""
    model, out = load_ours(write("mxfp4", tmp_path / "quantised")), tmp_path / "saved"
    model.save_pretrained(out, max_shard_size="100KB")
    model.save_pretrained(out, packed=True)
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same(run(load_ours(out)), run(model))


def test_saved_packed_keeps_what_was_said_of_the_configuration(tmp_path: Path) -> None:
    folder, out = write("fp8", tmp_path / "quantised"), tmp_path / "saved"
    model = moe_offload.from_pretrained(folder, "2GB", config=SETTINGS, num_experts_per_tok=1, rms_norm_eps=0.5)
    model.save_pretrained(out, packed=True)
    assert_same(run(load_ours(out)), run(model))


def test_saved_packed_without_the_change_is_refused(tmp_path: Path) -> None:
    model, out = load_ours(write("mxfp4", tmp_path / "quantised")), tmp_path / "saved"
    model.model.layers[0].self_attn.q_proj.weight.data += 1  # as peft merges an adapter
    with pytest.raises(SaveError, match=r"1 weights .* model\.layers\.0\.self_attn\.q_proj\.weight .*Save without"):
        model.save_pretrained(out, packed=True)
    model.save_pretrained(out)
    assert_same(run(load_ours(out)), run(model))


def test_saved_packed_of_files_that_changed_is_refused(tmp_path: Path) -> None:
    model, out = load_ours(write("mxfp4", tmp_path / "quantised")), tmp_path / "saved"
    rewrite(tmp_path / "quantised", lambda tensors: None)
    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors: was modified since"):
        model.save_pretrained(out, packed=True)
    (tmp_path / "quantised" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        model.save_pretrained(out, packed=True)
    assert not out.exists()


def test_saved_packed_where_nothing_came_packed_is_refused(tmp_path: Path) -> None:
    folder, out = write("mxfp4", tmp_path / "quantised"), tmp_path / "saved"
    ours = load_ours(folder)
    with pytest.raises(ConfigError, match=r"state_dict=.*leave one"):
        ours.save_pretrained(out, packed=True, state_dict=ours.state_dict())
    with pytest.raises(ConfigError, match=r"part of another: copy the files"):
        ours.model.save_pretrained(out, packed=True)
    with pytest.raises(SaveError, match=r"read from there"):
        ours.save_pretrained(folder, packed=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"loaded by transformers.*copy the files"):
        moe_offload.optimize(plain, "2GB", config=SETTINGS).save_pretrained(out, packed=True)
    moe_offload.pack_checkpoint(folder, tmp_path / "rows")
    with pytest.raises(ConfigError, match=r"packed rows"):
        load_ours(tmp_path / "rows").save_pretrained(out, packed=True)
    ours.save_pretrained(tmp_path / "bfloat16")
    with pytest.raises(ConfigError, match=r"not quantised: leave packed= out"):
        load_ours(tmp_path / "bfloat16").save_pretrained(out, packed=True)
    assert not out.exists()


def test_one_that_plain_transformers_loaded_is_saved_so_too(tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(write("fp8", tmp_path / "quantised"))
    want = run(load_ours(tmp_path / "quantised"))
    moe_offload.optimize(plain, "2GB", config=SETTINGS).save_pretrained(tmp_path / "saved")
    assert_same(run(load_ours(tmp_path / "saved")), want)


@pytest.mark.parametrize("kind", KINDS_SAVED)
def test_packed_anew_rows_keep_their_size(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / "quantised")
    moe_offload.pack_checkpoint(folder, tmp_path / "packed", verify="all")
    found, before = outline_folder(tmp_path / "packed"), outline_folder(folder)
    assert [moe.layout for moe in found.moe_layers] == [moe.layout for moe in before.moe_layers]
    assert [moe.packed for moe in found.moe_layers] == [moe.packed for moe in before.moe_layers]
    for moe, rows in zip(found.moe_layers, found.index.rows, strict=True):
        starts = [row[0].sources[0].offset for row in rows]
        assert [b - a for a, b in itertools.pairwise(starts)] == [moe.layout.row_bytes] * (len(rows) - 1)
    assert_same(run(load_ours(tmp_path / "packed")), run(load_ours(folder)))


def test_a_damaged_file_of_packed_rows(tmp_path: Path) -> None:
    moe_offload.pack_checkpoint(write("mxfp4", tmp_path / "quantised"), tmp_path / "packed")
    [file] = (tmp_path / "packed").glob("moe_offload_rows-*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=file.name):
        load_ours(tmp_path / "packed")
    moe, header = outline_folder(tmp_path / "quantised").moe_layers[0], 8 + int.from_bytes(whole[:8], "little")
    scales = next(field for field in moe.layout.fields if field.name.endswith("_scales"))
    damaged = bytearray(whole)
    damaged[header + scales.offset] = 255  # in the first expert of the first layer
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=rf"expert 0: .* is 255.*{file.name}"):
        load_ours(tmp_path / "packed").state_dict()
