"""forecast(), plan and estimate: from headers, from a folder or from the Hub, for devices that need not be there."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors import safe_open
from typer.testing import CliRunner

import moe_offload
from moe_offload.apps.cli import app
from moe_offload.apps.cli.estimate import choose_budgets
from moe_offload.apps.families.tiny import build
from moe_offload.checkpoint.pretrained.skeleton import read_configuration
from moe_offload.experts import find_experts
from moe_offload.observe.profile import Profile
from moe_offload.plan.expected_hits import RECORDED, covered_hit_rate, typical_hit_rate
from moe_offload.plan.weights import take_fingerprint
from tests.paths import MODEL

HUB = "someone/polyglot-tiny"


def run(*arguments: str):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_from_a_folder():
    found = moe_offload.forecast(MODEL, "6MB")
    assert found.arrangement.slots == moe_offload.make_plan(MODEL, "6MB").slots
    assert found.floor_bytes <= 6_000_000 < found.resident_bytes
    text = str(found)
    assert "headers of 1 shards" in text and "typical of 3 recorded workloads" in text and "KV cache at 2048" in text
    assert moe_offload.forecast(MODEL, found.floor_bytes).arrangement.slots == (4,) * 4
    assert min(moe_offload.forecast(MODEL, found.resident_bytes).arrangement.slots) == 64
    with pytest.raises(moe_offload.BudgetError, match="floor"):
        moe_offload.forecast(MODEL, found.floor_bytes - 1)


def test_from_a_configuration_alone(tmp_path):
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text())
    found = moe_offload.forecast(tmp_path, "6MB")
    assert "config.json alone" in found.source and found.arrangement.slots == moe_offload.make_plan(MODEL, "6MB").slots


def test_shards_that_do_not_fit_are_found_before_anything_is_loaded(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(moe_offload.CheckpointError, match=r"model\.safetensors"):
        moe_offload.forecast(tmp_path, "6MB")


@pytest.fixture
def hub(monkeypatch):
    """The Hub as it answers range requests for the headers of polyglot-tiny."""
    file = "model.safetensors"
    header, end = {}, 0
    with safe_open(MODEL / file, framework="pt") as opened:
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        for key in opened.keys():
            tensor = opened.get_tensor(key)
            size = tensor.numel() * tensor.element_size()
            header[key] = TensorInfo(names[tensor.dtype], list(tensor.shape), (end, end + size))
            end += size
    asked = []

    def answer(name):
        asked.append(name)
        metadata = SafetensorsFileMetadata(metadata={}, tensors=header)
        return SafetensorsRepoMetadata(None, False, dict.fromkeys(header, file), {file: metadata})

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", answer)
    monkeypatch.setattr("moe_offload.checkpoint.outline._cached", lambda name, said: None)
    monkeypatch.setattr(
        "moe_offload.checkpoint.outline.read_configuration", lambda name, said: read_configuration(MODEL, said)
    )
    return asked, header


def test_from_the_hub(hub):
    asked, header = hub
    found = moe_offload.forecast(HUB, "6MB")
    assert asked == [HUB] and "on the Hub" in found.source
    assert found.arrangement == moe_offload.forecast(MODEL, "6MB").arrangement
    missing = next(key for key in header if "experts" in key)
    del header[missing]
    with pytest.raises(moe_offload.CheckpointError):
        moe_offload.forecast(HUB, "6MB")


def test_a_hub_that_lies_about_sizes(hub):
    _, header = hub
    key = next(iter(header))
    header[key] = TensorInfo(header[key].dtype, [1, 2, 3], header[key].data_offsets)
    with pytest.raises(moe_offload.CheckpointError, match="cannot be read here"):
        moe_offload.forecast(HUB, "6MB")


def test_without_a_connection_it_says_what_to_try(monkeypatch):
    def offline(name):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", offline)
    monkeypatch.setattr("moe_offload.checkpoint.outline._cached", lambda name, said: None)
    result = run("plan", HUB, "--budget", "6MB")
    assert result.exit_code == 4 and len(result.stderr.splitlines()) == 1
    assert "Name or service not known" in result.stderr and "HF_HUB_OFFLINE" in result.stderr


def profile_of(model, counts):
    moe_layers = find_experts(model)
    return Profile.of(take_fingerprint(model, moe_layers), 100, [counts] * len(moe_layers))


def test_the_hit_rate_of_a_profile_is_what_its_hottest_cover(tmp_path):
    with torch.device("meta"):
        model = build("qwen3_moe", num_hidden_layers=1)
    experts = find_experts(model)[0].num_experts
    profile = profile_of(model, [70, 20, 10] + [0] * (experts - 3))
    assert covered_hit_rate([2], profile).expected == pytest.approx(0.9)
    assert covered_hit_rate([experts], profile).expected == 1.0
    found = moe_offload.forecast(model, "1GB", profile=profile)
    assert found.hit_rate.expected == 1.0 and "profile" in found.hit_rate.source
    with pytest.raises(moe_offload.ProfileError):
        moe_offload.forecast(MODEL, "6MB", profile=profile)
    result = run("plan", MODEL, "--budget", "6MB", "--profile", profile.save(tmp_path / "p.json"))
    assert result.exit_code == 6 and "another model" in result.stderr


@pytest.mark.parametrize("curve", RECORDED.values(), ids=RECORDED)
def test_the_recorded_curves_rise_from_nothing_to_all(curve):
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(curve))
    assert typical_hit_rate([0], [64]).expected == 0 and typical_hit_rate([64], [64]).expected == 1
    rates = [typical_hit_rate([s], [64]).expected for s in range(65)]
    assert rates == sorted(rates)
    middle = typical_hit_rate([16], [64])
    assert middle.low == pytest.approx(0.544) and middle.high == pytest.approx(0.704)


def test_plan_json_and_explain():
    facts = json.loads(run("plan", MODEL, "--budget", "6MB", "--context", "64", "--explain", "--json").stdout)
    assert facts["budget"] == 6_000_000 and facts["context"]["tokens"] == 64 and len(facts["slots"]) == 4
    assert facts["hit_rate"]["source"].startswith("typical") and "not offloaded" in facts["explain"]
    assert set(facts["bytes"]) == {
        "dense_weights",
        "reserve",
        "prefill_scratch",
        "weight_unpacking",
        "expert_slots",
        "unused",
    }
    assert sum(facts["bytes"].values()) == facts["budget"]
    assert facts["context"]["largest"] >= 64 and facts["resident"] > facts["floor"]
    text = run("plan", MODEL, "--budget", "6MB", "--explain").stdout
    assert "by default" in text and "embeddings and head" in text


def test_plan_for_two_devices_that_are_not_here():
    device_map = '{"": 0, "model.layers.2": 1, "model.layers.3": 1, "model.layers.*.mlp.experts": cpu}'
    wide = ("--device-map", "auto", "--max-memory", "{0: 174MB, 1: 174MB}")
    result = run("plan", MODEL, *wide, "--explain")
    assert result.exit_code == 0, result.output
    assert "cuda:0:" in result.stdout and "cuda:1:" in result.stdout
    refused = run("plan", MODEL, "--device-map", device_map, "--max-memory", "{0: 174MB, 1: 174MB, cpu: 1MB}")
    assert refused.exit_code == 3 and "sends 9.44 MB of experts to 'cpu'" in refused.stderr
    facts = json.loads(
        run("plan", MODEL, "--device-map", device_map, "--max-memory", "{0: 174MB, 1: 174MB}", "--json").stdout
    )
    assert facts["tiers"] == ["host"] * 4 and list(facts["devices"]) == ["cuda:0", "cuda:1"]


def test_a_device_that_is_not_here_is_refused_at_run_time():
    with pytest.raises(moe_offload.UnsupportedModelError, match=r"xpu:0.*computes on cpu.*forecast"):
        moe_offload.from_pretrained(MODEL, max_memory={"xpu:0": "6MB"})


def test_estimate():
    result = run("estimate", MODEL, "--budget", "1MB,6MB,20MB")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if " MB " in line and ("yes" in line or " no" in line)]
    assert [row[2] for row in rows] == ["no", "yes", "yes"]
    assert "typical of 3" in result.stdout and "floor" in result.stdout
    (facts,) = json.loads(run("estimate", MODEL, "--json").stdout)
    assert [row["fits"] for row in facts["rows"]] == [True] * len(facts["rows"]) and len(facts["rows"]) >= 3
    assert facts["rows"][0]["budget"] == facts["floor_bytes"] and facts["rows"][-1]["residency"] == 1
    assert facts["rows"][-1]["hit_rate"]["expected"] == 1


def test_estimate_of_several_names_the_largest_that_fits(tmp_path):
    build("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path)
    result = run("estimate", MODEL, tmp_path, "--budget", "3MB,6MB")
    assert result.exit_code == 0, result.output
    largest = result.stdout[result.stdout.index("the largest that fits") :]
    assert str(MODEL) in largest.splitlines()[2]


def test_nothing_that_fits_is_exit_code_3():
    result = run("estimate", MODEL, "--budget", "1MB")
    assert result.exit_code == 3 and " no" in result.stdout


def test_the_ladder_goes_from_the_floor_to_all_resident():
    assert choose_budgets(5 * 10**9, 20 * 10**9) == [
        5 * 10**9,
        6 * 10**9,
        8 * 10**9,
        12 * 10**9,
        16 * 10**9,
        20 * 10**9,
    ]
    assert choose_budgets(100, 500) == [100, 200, 300, 400, 500]
