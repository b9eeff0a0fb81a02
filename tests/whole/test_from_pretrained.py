"""A real checkpoint folder, from disk: same tokens; and a folder that is wrong, before or while the model runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_offload
from tests.paths import MODEL

BUDGET = "6MB"  # of 11
PROMPTS = ("Il comando ls elenca", "The options are as follows:")


def generate(model, text: str, new_tokens: int = 24, **kwargs) -> list[int]:
    inputs = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **kwargs)[0].tolist()


@pytest.fixture(scope="module")
def want() -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    return [generate(model, prompt) for prompt in PROMPTS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_same_tokens_as_plain_transformers_within_the_budget(want) -> None:
    with moe_offload.from_pretrained(MODEL, BUDGET, config={"poison": True}).moe_offload as handle:
        assert [generate(handle.model, prompt) for prompt in PROMPTS] == want
        assert handle.plan.bank_bytes < handle.plan.expert_bytes
        stats = handle.stats()
        assert stats.misses > 0 and stats.hits > 0 and stats.bytes_read > 0
        assert len(handle.graphs) <= 3


def test_static_cache_and_batches(want) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    plain = AutoModelForCausalLM.from_pretrained(MODEL)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    with moe_offload.from_pretrained(MODEL, BUDGET).moe_offload as handle:
        assert torch.equal(handle.model.generate(**batch, **options), plain.generate(**batch, **options))


def test_sharded_and_already_stacked(folder: Path, want) -> None:
    """The same weights in several shards with an index, then with the experts stacked: both are read where they lie."""
    plain = AutoModelForCausalLM.from_pretrained(MODEL)
    sharded = folder.parent / "sharded"
    plain.save_pretrained(sharded, max_shard_size="3MB")
    stacked = folder.parent / "stacked"
    plain.save_pretrained(stacked, save_original_format=False)
    for path in (sharded, stacked):
        with moe_offload.from_pretrained(path, BUDGET).moe_offload as handle:
            assert [generate(handle.model, prompt) for prompt in PROMPTS] == want
    assert len(list(sharded.glob("*.safetensors"))) > 1


def _rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5_000_000)


def _lose_expert(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.2.mlp.experts.17.up_proj.weight"))


def _lose_dense(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))


def _lose_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "model.safetensors"),
        (_lose_expert, "17"),
        (_lose_dense, "q_proj"),
        (_lose_shard, "model-00001-of-00002"),
        (lambda folder: (folder / "config.json").write_text("{"), "config"),
    ],
    ids=["truncated", "expert missing", "dense missing", "shard missing", "config damaged"],
)
def test_damaged_checkpoint(folder: Path, damage, says: str) -> None:
    damage(folder)
    with pytest.raises(moe_offload.CheckpointError, match=says):
        moe_offload.from_pretrained(folder, BUDGET)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"budget": "1MB"}, moe_offload.BudgetError, "floor"),
        ({"budget": "six"}, moe_offload.ConfigError, "six"),
        ({"budget": BUDGET, "device_map": {"model.layer.*.mlp": "disk"}}, moe_offload.ConfigError, "names no module"),
        ({"budget": BUDGET, "config": {"half_live": 3}}, moe_offload.ConfigError, "half_life"),
        ({"budget": BUDGET, "device_map": {"": "cuda:0"}}, moe_offload.UnsupportedModelError, "computes on cpu"),
        ({"budget": BUDGET, "profile": "nowhere.json"}, moe_offload.ProfileError, "nowhere.json"),
        ({"budget": BUDGET, "dtype": "bfloat61"}, moe_offload.OffloadError, "bfloat61"),
    ],
)
def test_bad_arguments_are_refused_before_loading(arguments, error, says, monkeypatch) -> None:
    import moe_offload.api

    monkeypatch.setattr(moe_offload.api, "load_dense", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(error, match=says):
        moe_offload.from_pretrained(MODEL, **arguments)


def test_profile_of_another_model(tmp_path: Path) -> None:
    from moe_offload.apps.families.tiny import build

    other = moe_offload.record_profile(build("mixtral"), torch.tensor([[5, 6, 7]])).save(tmp_path / "other.json")
    with pytest.raises(moe_offload.ProfileError, match="mixtral"):
        moe_offload.from_pretrained(MODEL, BUDGET, profile=other)


def test_no_such_folder() -> None:
    with pytest.raises(moe_offload.CheckpointError, match="there is nothing there"):
        moe_offload.from_pretrained("./no/such/folder", BUDGET)


def test_shard_truncated_while_running(folder: Path, want) -> None:
    model = moe_offload.from_pretrained(folder, BUDGET)
    assert generate(model, PROMPTS[0]) == want[0]
    _truncate(folder)
    with pytest.raises((moe_offload.ExpertReadError, moe_offload.CheckpointChangedError), match=r"model\.safetensors"):
        generate(model, PROMPTS[1])
    assert not model.moe_offload.closed


def test_shard_overwritten_while_running(folder: Path) -> None:
    model = moe_offload.from_pretrained(folder, BUDGET)
    generate(model, PROMPTS[0], 2)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(8_000_000)
        file.write(b"other weights")
    with pytest.raises(moe_offload.CheckpointChangedError, match=r"model\.safetensors"):
        generate(model, PROMPTS[1])


def test_shard_replaced_or_removed_while_running(folder: Path, want) -> None:
    """The open descriptor keeps the file that was planned with: pruning a cache folder harms nothing."""
    model = moe_offload.from_pretrained(folder, BUDGET)
    (folder / "model.safetensors").unlink()
    assert [generate(model, prompt) for prompt in PROMPTS] == want


def test_profile_is_a_prior(tmp_path: Path, want) -> None:
    with moe_offload.from_pretrained(MODEL, BUDGET).moe_offload as handle:
        generate(handle.model, PROMPTS[0])
        cold = handle.stats()
        profile = handle.save_profile(tmp_path / "it.json", language="it")
    with moe_offload.from_pretrained(MODEL, BUDGET, profile=profile).moe_offload as handle:
        assert handle.stats().prewarm_bytes > 0
        assert generate(handle.model, PROMPTS[0]) == want[0]
        assert handle.stats().misses < cold.misses
