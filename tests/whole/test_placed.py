"""Experts in float32 begin as far from a cache line as plain transformers has them, which maps the file: on processors
where MKL's sum depends on it, half of all checkpoints whose experts it leaves where they are gave other last bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moe_offload
from moe_offload.apps.families.session import family_of, run_session
from moe_offload.apps.families.tiny import build
from moe_offload.errors import UnsupportedModelError
from moe_offload.experts import find_experts
from tests.checkpoint.test_file_entry import save_beyond

#: One or more of each form, whose experts the loader leaves where the file has them; the layers of zaya and of
#: muse_spark begin at several places.
FAMILIES = ["dbrx", "switch_transformers", "qwen3_vl_moe", "zaya", "muse_spark", "llama4"]
OPTIONS: dict[str, Any] = {"prompt": 5, "new_tokens": 3}


def save(model: Any, folder: Path, beyond: int = 8) -> None:
    model.save_pretrained(folder)
    move(folder / "model.safetensors", beyond)


def move(file: Path, beyond: int) -> None:
    """Let the data of a file begin so many bytes beyond a multiple of 16."""
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}
    save_beyond(tensors, file, beyond)


def begins_of(moe_layers: Any) -> list[Any]:
    """Where each expert's matrices begin, by what `moe_layers` say of them."""
    fields = [[f.is_placed for f in moe.layout.fields] for moe in moe_layers]
    return [
        [begin for begin, placed in zip(moe.elsewhere.get(e, moe.layout.begins), kept, strict=True) if placed]
        for moe, kept in zip(moe_layers, fields, strict=True)
        for e in range(moe.num_experts)
    ]


def assert_exact(plain: Any, ours: Any) -> None:
    kind = family_of(plain).kind  # type: ignore[union-attr]
    want, got = run_session(plain, kind, **OPTIONS), run_session(ours, kind, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_mapped_file_give_the_bits_of_plain_transformers(family: str, tmp_path: Path) -> None:
    model = build(family)
    save(model, tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    begins = begins_of(find_experts(plain))
    assert any(begin % 16 for begin in begins[0])
    ours: Any = moe_offload.from_pretrained(tmp_path, "40MB", config={"profile": "off"})
    assert begins_of(ours.moe_offload.moe_layers) == begins
    assert_exact(plain, ours)
    ours.moe_offload.close()
    loaded = type(model).from_pretrained(tmp_path).eval()
    ours = moe_offload.optimize(loaded, "40MB", config={"profile": "off"})
    assert begins_of(ours.moe_offload.moe_layers) == begins
    assert_exact(plain, ours)
    ours.moe_offload.close()


@pytest.mark.parametrize("family", ["switch_transformers", "dbrx", "zaya"])
def test_a_packed_copy_keeps_where_the_original_has_them(family: str, tmp_path: Path) -> None:
    model = build(family)
    save(model, tmp_path / "original")
    plain = type(model).from_pretrained(tmp_path / "original").eval()
    packed = moe_offload.pack_checkpoint(tmp_path / "original", tmp_path / "packed")
    ours: Any = moe_offload.from_pretrained(packed, "40MB", config={"profile": "off"})
    assert begins_of(ours.moe_offload.moe_layers) == begins_of(find_experts(plain))
    places = {name: p.data_ptr() % 64 for name, p in plain.named_parameters()}
    mine = {name: p.data_ptr() % 64 for name, p in ours.named_parameters() if "expert" not in name}
    assert mine == {name: places[name] for name in mine} and any(mine.values())
    assert_exact(plain, ours)
    ours.moe_offload.close()


def test_experts_of_one_layer_that_begin_at_several_places_are_copied_where_they_belong(tmp_path: Path) -> None:
    """Those of a layer may lie in several files, whose data begin at different places."""
    model = build("switch_transformers")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    for i, file in enumerate(files):
        move(file, 8 * (i % 2))
    plain = type(model).from_pretrained(tmp_path).eval()
    ours: Any = moe_offload.from_pretrained(tmp_path, "40MB", config={"profile": "off"})
    assert any(moe.elsewhere for moe in ours.moe_offload.moe_layers)
    assert begins_of(ours.moe_offload.moe_layers) == begins_of(find_experts(plain))
    assert_exact(plain, ours)
    ours.save_pretrained(tmp_path / "again")
    want, got = plain.state_dict(), type(model).from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(want[key], got[key]) for key in want)
    ours.moe_offload.close()


def load_elsewhere(folder: Path) -> Any:
    """A model of several files, in every second of which experts begin elsewhere."""
    build("switch_transformers").save_pretrained(folder, max_shard_size="60KB")
    for i, file in enumerate(sorted(folder.glob("*.safetensors"))):
        move(file, 8 * (i % 2))
    return moe_offload.from_pretrained(folder, "40MB", config={"profile": "off"})


def double(wi: Any, _: Any) -> None:
    wi.weight.mul_(2)


def test_what_an_expert_writes_to_a_copy_of_its_weights_is_refused_too(tmp_path: Path) -> None:
    ours = load_elsewhere(tmp_path)
    for moe in ours.moe_offload.moe_layers:
        for e in moe.elsewhere:
            ours.get_submodule(f"{moe.name}.expert_{e}.wi").register_forward_pre_hook(double)
    with pytest.raises(UnsupportedModelError, match="changes its own weights"):
        run_session(ours, "encdec", **OPTIONS)


def test_copies_of_experts_that_begin_elsewhere_take_the_memory_of_one(tmp_path: Path) -> None:
    ours = load_elsewhere(tmp_path)
    run_session(ours, "encdec", **OPTIONS)
    layers = ours.moe_offload.moe_layers
    held = [moe.name for moe in layers if moe.modules[0]._moe_offload._copies]
    assert sum(bool(moe.elsewhere) for moe in layers) > 1 and len(held) == 1
    ours.moe_offload.close()


def test_a_matrix_whose_rows_do_not_fill_vectors_is_refused_in_float32(tmp_path: Path) -> None:
    """Where hidden states of a pair begin depends on which pairs are computed with it."""
    model = build("qwen3_moe", moe_intermediate_size=30)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts: its down_proj is torch\.float32"):
        moe_offload.optimize(model, "40MB")
    moe_offload.optimize(model.bfloat16(), "40MB", config={"profile": "off"}).moe_offload.close()


def test_a_file_that_claims_impossible_places_is_refused(tmp_path: Path) -> None:
    model = build("dbrx")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}
    for begins in ('{"lm_head.weight": 64}', '{"lm_head.weight": "a"}', '{"none": 0}', "[1]", "{"):
        save_file(tensors, file, metadata={"format": "pt", "moe_offload_begins": begins})
        with pytest.raises(moe_offload.CheckpointError, match="not a usable safetensors file"):
            moe_offload.from_pretrained(tmp_path, "40MB")
    save_file(tensors, file, metadata={"format": "pt", "moe_offload_begins": json.dumps({"lm_head.weight": 4})})
    ours: Any = moe_offload.from_pretrained(tmp_path, "40MB", config={"profile": "off"})
    assert ours.lm_head.weight.data_ptr() % 64 == 4
    ours.moe_offload.close()
