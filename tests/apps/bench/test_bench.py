"""The bench end to end on a tiny synthetic model, and its parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moe_offload
from moe_offload.apps.bench.roofs import disk as roofs
from moe_offload.apps.bench.routing import load_recorded
from moe_offload.apps.bench.sides.contenders import CPU_SIDES, PACKED, Job, write_mapped
from moe_offload.apps.bench.synthetic import make_synthetic
from moe_offload.apps.bench.table import RATIOS
from moe_offload.apps.cli import app
from moe_offload.apps.families.tiny import build as build_family
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.pack import pack_checkpoint
from tests.fakes import loop_models
from tests.fakes.remote_folder import write_remote


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    ids = np.stack([[rng.permutation(32)[:3] for _ in range(5)] for _ in range(40)])
    ids[3, 2, 1] = -1
    file = tmp_path_factory.mktemp("trace") / "recorded.npz"
    np.savez(file, experts=ids)
    return file


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def measured(cache, trace, tmp_path, monkeypatch):
    """Runs the bench and answers with its result and what it printed."""
    monkeypatch.setattr(roofs, "SECONDS", 0.1)

    def measure(*arguments: str, layers: int, tokens: int):
        file = tmp_path / "result.json"
        amounts = ["--layers", str(layers), "--prompt-tokens", "24", "--new-tokens", str(tokens), "--packed"]
        done = run(
            *("synthetic:tiny", "--routing", str(trace), "--cache", str(cache), "--out", str(file)),
            *(*amounts, *arguments),
        )
        assert done.exit_code == 0, done.output
        assert not [entry.name for entry in cache.iterdir() if "-layers" not in entry.name]  # temporary files are gone
        return json.loads(file.read_text()), done.output

    return measure


@pytest.mark.timeout(600)
def test_ours_beside_the_resident_model(measured):
    result, shown = measured("--residency", "50%", "--requests", "1", "--sides", "resident,ours", layers=1, tokens=3)
    _, ours = result["rows"]
    assert not any(row["failed"] for row in result["rows"])
    assert result["tokens_agree"] == [{"side": "ours", "asked": "50%", "agree": 4, "of": 4}]
    assert result["resident_and_ours_took_turns"] and "all sides gave the tokens of resident" in shown
    assert all(ours[ratio] > 0 for ratio in ("decode_over_roof", "prefill_over_roof", "read_bandwidth_over_raw"))
    assert 0 < ours["hit_rate"] <= ours["belady_hit_rate"] <= 1
    assert "recorded" in result["routing"] and "half the trace further" in result["routing"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_side_in_one_run(measured):
    sides = "resident,ours,accelerate@50%,mmap@50%"
    result, shown = measured("--residency", "50%,100%", "--requests", "2", "--sides", sides, layers=2, tokens=6)
    assert {row["side"] for row in result["rows"]} == {"resident", "ours", "accelerate", "mmap"}
    assert not any(row["failed"] for row in result["rows"])
    assert result["tokens_of"] == "resident" and len(result["tokens_agree"]) == 4
    assert all(one["agree"] == one["of"] > 0 for one in result["tokens_agree"])
    ours, whole = (row for row in result["rows"] if row["side"] == "ours")
    assert all(ours[ratio] > 0 for ratio in RATIOS["cpu"])
    assert ours["bytes_per_token"] > 0
    assert whole["bytes_per_token"] < ours["bytes_per_token"] and whole["hit_rate"] <= whole["belady_hit_rate"]
    assert whole["decode_over_roof"] > 0 and "speedup_over_mmap" not in whole
    assert "all sides gave the tokens of resident" in shown


def test_every_side_loads_the_same_model(cache, tmp_path):
    folder = make_synthetic("tiny", 2, cache)
    pack_checkpoint(folder, tmp_path / PACKED, verify="none")
    write_mapped(folder, tmp_path)
    ids_BT = torch.arange(12).view(1, -1)
    logits = {}
    for side, contender in CPU_SIDES.items():
        model = contender.load(Job(folder, 5_000_000, tmp_path, 16))
        with torch.no_grad():
            logits[side] = model(ids_BT).logits
        if side == "ours":
            assert 0 < model.moe_offload.plan.residency < 1
            model.moe_offload.close()
    assert list(logits) == ["resident", "ours", "accelerate", "mmap"]
    assert all(torch.equal(logits["resident"], other) for other in logits.values())


def assert_sides_agree(sides, folder, want, tmp_path, **options):
    write_mapped(folder, tmp_path, **options)
    for side in sides:
        model = CPU_SIDES[side].load(Job(folder, 20_000_000, tmp_path, 16, **options))
        with torch.no_grad():
            assert torch.equal(model(loop_models.prompt()).logits, want), side


def test_every_side_loads_a_model_with_code_of_its_own(tmp_path):
    """But for accelerate's: transformers' own loader leaves such a model without its rotary frequencies."""
    folder = write_remote(tmp_path / "own")
    want = loop_models.build()(loop_models.prompt()).logits
    assert_sides_agree(["resident", "ours", "mmap"], folder, want, tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash", "llama4"])
def test_every_side_loads_experts_that_are_no_plain_stacks(family, tmp_path):
    """Joined in one dimension; fewer in one stack than in the other; all multiplied at once."""
    plain = build_family(family)
    plain.save_pretrained(tmp_path / "folder")
    assert_sides_agree(CPU_SIDES, tmp_path / "folder", plain(loop_models.prompt()).logits, tmp_path)


@pytest.mark.long
def test_a_model_with_code_of_its_own_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(roofs, "SECONDS", 0.1)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # of the processes that are started
    folder = write_remote(tmp_path / "own")
    amounts = ["--prompt-tokens", "8", "--new-tokens", "4", "--requests", "1", "--residency", "50%"]
    done = run(
        *(str(folder), "--trust-remote-code", "--sides", "resident,ours,mmap", "--json"),
        *("--cache", str(tmp_path / "cache"), *amounts),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [(row["side"], row["failed"]) for row in result["rows"]] == [("resident", ""), ("ours", ""), ("mmap", "")]
    assert all(one["agree"] == one["of"] == 5 for one in result["tokens_agree"])


def test_routing_is_not_replayed_where_experts_are_not_handed_ids(trace, tmp_path):
    folder = write_remote(tmp_path / "own")
    done = run(str(folder), "--trust-remote-code", "--routing", str(trace), "--cache", str(tmp_path))
    assert done.exit_code == 2 and "model.layers.0.mlp.experts is not handed the ids" in done.output, done.output
    done = run(str(folder), "--cache", str(tmp_path))
    assert done.exit_code != 0 and "--trust-remote-code" in done.output and "Traceback" not in done.output


def test_wrong_requests_are_one_line(cache, tmp_path):
    for arguments, words in [
        (["synthetic:tiny", "--budget", "1GB", "--residency", "25%"], "either --budget"),
        (["synthetic:nothing"], "no such architecture"),
        (["synthetic:tiny", "--trust-remote-code"], "--trust-remote-code is for a checkpoint"),
        (["synthetic:tiny", "--layers", "9", "--budget", "1GB"], "1 to 3 layers"),
        ([str(tmp_path), "--layers", "2", "--budget", "1GB"], "--layers is for synthetic:"),
        ([str(tmp_path), "--experts", "fp8", "--budget", "1GB"], "--experts is for synthetic:"),
        (["synthetic:tiny", "--residency", "0%"], "--residency '0%'"),
        (["synthetic:tiny", "--residency", "much"], "--residency 'much'"),
        (["synthetic:tiny", "--residency", "50%", "--routing", "absent.npz"], "no such file"),
        (["synthetic:tiny", "--residency", "50%", "--sides", "ours,theirs"], "--sides theirs"),
        (
            ["synthetic:tiny", "--residency", "50%", "--sides", "ours-host"],
            "--device cpu there are resident, ours, acc",
        ),
        (["synthetic:tiny", "--residency", "50%", "--sides", "ours@25%"], "25% is not among what is measured"),
        (["synthetic:tiny", "--residency", "50%,110%"], "--residency '110%'"),
        (["synthetic:tiny", "--residency", "50%", "--device", "tpu"], "it takes cpu, cuda"),
    ]:
        done = run(*arguments, "--cache", str(cache))
        assert done.exit_code == 2, (arguments, done.output)
        assert words in done.output and "Traceback" not in done.output, done.output


def test_a_synthetic_checkpoint_is_an_ordinary_one(cache):
    folder = make_synthetic("tiny", cache=cache)
    assert make_synthetic("tiny", cache=cache) == folder
    with safe_open(folder / "model-00002-of-00004.safetensors", framework="pt") as shard:
        assert "model.layers.0.mlp.experts.0.gate_proj.weight" in set(shard.keys())  # as published: one tensor each
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    rows = model.model.layers[1].mlp.experts.down_proj.flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert not torch.equal(rows, model.model.layers[0].mlp.experts.down_proj.flatten(1))


@pytest.mark.parametrize("experts", ["fp8", "mxfp4", "int4"])
def test_experts_may_be_quantised(experts, tmp_path):
    if experts != "fp8":
        pytest.importorskip("compressed_tensors")
    folder = make_synthetic("tiny", 1, tmp_path, experts)
    assert folder.name == f"tiny_1-layers_{experts}_skewed"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = plain.model.layers[0].mlp.experts.down_proj.float()
    assert 0.01 < weights.square().mean().sqrt() < 0.04 and len(weights.flatten(1).unique(dim=0)) == len(weights)
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = moe_offload.from_pretrained(folder, "8GB")
    with torch.no_grad(), ours.moe_offload:
        assert torch.equal(ours(ids).logits, plain(ids).logits)


def test_the_bench_takes_a_quantised_synthetic_model(trace, tmp_path, monkeypatch):
    monkeypatch.setattr(roofs, "SECONDS", 0.1)
    amounts = ["--layers", "1", "--prompt-tokens", "8", "--new-tokens", "4", "--requests", "1", "--residency", "50%"]
    done = run(
        *("synthetic:tiny", "--experts", "fp8", "--sides", "resident,ours", "--routing", str(trace), "--json"),
        *("--cache", str(tmp_path), *amounts),
    )
    assert done.exit_code == 0, done.output
    assert [row["side"] for row in json.loads(done.stdout)["rows"]] == ["resident", "ours"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"1\.00 KB are free"):
        make_synthetic("tiny", cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_mapping_a_trace(trace):
    with np.load(trace) as file:
        ids = file["experts"]
    same = load_recorded(trace, layers=5, experts=32, top_k=3)
    assert torch.equal(same.ids_TLK[0], torch.from_numpy(ids[0]))
    wider = load_recorded(trace, layers=2, experts=32, top_k=6).ids_TLK
    assert wider.shape == (40, 2, 6)
    assert all(len(set(row)) == 6 for token in wider.tolist() for row in token)
    assert torch.equal(wider[0, 1, :3], torch.from_numpy(ids[0, 2]))  # layer 1 of 2 replays recorded layer 2 of 5
    narrow = load_recorded(trace, layers=5, experts=16, top_k=4)
    assert narrow.ids_TLK.max() < 16 and "modulo 16" in narrow.note


@pytest.mark.parametrize("bad", [np.zeros((3, 4)), np.full((2, 2, 2), -5), np.zeros((0, 1, 1))])
def test_traces_that_are_none(tmp_path, bad):
    file = tmp_path / "bad.npz"
    np.savez(file, experts=bad)
    with pytest.raises(ConfigError, match=r"bad\.npz"):
        load_recorded(file, 2, 8, 2)
    file.write_bytes(b"no zip")
    with pytest.raises(ConfigError, match=r"bad\.npz"):
        load_recorded(file, 2, 8, 2)


def test_the_disk_roof_counts_bytes(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(1 << 20))
    assert roofs.disk_roof([file], 1 << 16, depth=2, seconds=0.05, seed=0) > 0
