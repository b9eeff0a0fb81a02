"""What the sides on a GPU are told, and what is planned for them: no GPU is needed to say it."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import transformers

from moe_offload import OffloadConfig
from moe_offload.apps.bench.command import make_workload
from moe_offload.apps.bench.devices import Cuda
from moe_offload.apps.bench.run import choose_plans, missing_rivals
from moe_offload.apps.bench.sides.contenders import Job
from moe_offload.apps.bench.sides.gpu_contenders import GPU_SIDES, settings_of_ours
from moe_offload.apps.bench.sides.names import DEFAULT
from moe_offload.apps.bench.sides.side import SIDES
from moe_offload.errors import ConfigError

ASKED = {"budget": None, "layers": None, "routing": None, "prompt": None, "packed": False}
AMOUNTS = {"prompt_tokens": 3000, "new_tokens": 64, "requests": 3}


@pytest.fixture
def planned(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(Cuda, "check", lambda self: None)
    cache = tmp_path_factory.getbasetemp() / "synthetic"
    return lambda device: make_workload(
        "synthetic:tiny", device=device, residency=[0.5, 0.25, 0.5], cache=cache, **ASKED, **AMOUNTS
    )


@pytest.fixture
def work(planned):
    return planned("cuda")


def test_ours_differ_in_who_decides_alone():
    device, host = (settings_of_ours(["model.layers.0.mlp.experts"], 5000, decide) for decide in ("device", "host"))
    assert {**device, "decide": "host"} == host
    config = OffloadConfig.from_dict(device)
    assert config.device_map == {"": 0, "model.layers.0.mlp.experts": "cpu"}
    assert config.policy == "decayed_lfu" and config.untested and config.kv_tokens == 5000
    assert settings_of_ours([], 10, "host")["kv_tokens"] == OffloadConfig().kv_tokens  # never less than by default


def test_what_the_others_are_told(monkeypatch, tmp_path):
    told = {}
    model = types.SimpleNamespace(eval=lambda: "loaded")
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda folder, **given: told.update(given) or model
    )
    job = Job(tmp_path, 5, tmp_path, 100)
    assert GPU_SIDES["resident"].load(job) == "loaded"
    assert told == {"dtype": "auto", "device_map": {"": 0}}  # straight to the GPU: not all of it in RAM first
    assert GPU_SIDES["accelerate"].load(job) == "loaded"
    assert told["device_map"] == "auto" and told["max_memory"][0] == 5 and told["max_memory"]["cpu"] > 10**8


def test_what_is_compiled_is_given_a_static_cache():
    options = {side: dict(contender.options) for side, contender in GPU_SIDES.items()}
    static = {"cache_implementation": "static"}
    assert options == {"resident": static, "ours": static, "ours-host": static, "accelerate": {}}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_residency_is_planned_once_with_room_for_the_request(planned, device):
    work = planned(device)
    assert list(work.plans) == ["50%", "25%"] and work.tokens == 3064
    assert [plan.slots for plan in work.plans.values()] == [(16, 16, 16), (8, 8, 8)]
    kv_bytes = 2 * 3 * 2 * 32 * 3064 * 2  # keys and values, layers, heads, head size, tokens, bf16
    caches = 2 if device == "cuda" else 1  # one in use, and one kept
    assert {plan.costs.kv_bytes for plan in work.plans.values()} == {caches * kv_bytes}


def test_what_does_not_count_is_at_most_half(work):
    assert work.request(1, 64)["left_out"] == 8
    assert work.request(1, 4)["left_out"] == 2


def test_no_warm_up_is_longer_than_there_is_room_for(planned):
    """The routing of a side has room for a request, and no more."""
    assert {device: tuple(sides) for device, sides in SIDES.items()} == DEFAULT
    for device, sides in SIDES.items():
        few = replace(planned(device), new_tokens=3)
        assert all(few.effort(side).warm_up_tokens <= 3 for side in sides)


def test_sides_are_chosen_by_residency(work):
    assert choose_plans(["resident", "ours@25%", "ours@50%", "accelerate@50%"], work) == {
        "resident": ("50%", "25%"),
        "ours": ("50%", "25%"),
        "accelerate": ("50%",),
    }
    with pytest.raises(ConfigError, match="10% is not among what is measured, 50%, 25%"):
        choose_plans(["ours@10%"], work)
    with pytest.raises(
        ConfigError, match="--sides mmap: for --device cuda there are resident, ours, ours-host, accelerate"
    ):
        choose_plans(["mmap"], work)


def test_a_rival_that_is_absent_is_said(monkeypatch):
    assert missing_rivals("cpu") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = missing_rivals("cuda")
    assert line.startswith("MoE-Infinity: not installed")


def test_packed_rows_are_for_disks(monkeypatch, tmp_path):
    monkeypatch.setattr(Cuda, "check", lambda self: None)
    with pytest.raises(ConfigError, match="--packed is for rows that are read from disk"):
        make_workload(
            "synthetic:tiny", device="cuda", residency=[0.5], cache=tmp_path, **{**ASKED, "packed": True}, **AMOUNTS
        )
