"""Which experts code is rewritten on a GPU: never the one that copies a matrix for every token-expert pair."""

from __future__ import annotations

import pytest

from moe_offload import ConfigError, OffloadConfig
from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts
from moe_offload.patch.install import choose_implementation
from moe_offload.plan import arrange, prepare
from tests.fakes.offloaded import QWEN


@pytest.fixture
def model():
    model = build(QWEN, num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")
    return model


def test_a_models_own_choice_is_kept_on_a_cpu_and_not_on_a_gpu(model):
    chosen = [choose_implementation(find_experts(model), "auto", device) for device in ("cpu", "cuda:0")]
    assert chosen == ["batched_mm", "grouped_mm"]


@pytest.mark.parametrize("device", ["cpu", 0])
def test_who_asks_for_it_on_a_gpu_is_told(model, device, monkeypatch):
    monkeypatch.setattr(prepare, "usable_kinds", lambda untested: ["cpu", "cuda"])
    monkeypatch.setattr(arrange, "free_bytes", lambda device: 1 << 34)
    settings = OffloadConfig(
        budget="1GB", device_map={"": device}, experts_implementation="batched_mm", profile="off", untested=True
    )
    if device == "cpu":
        prepare.prepare_model(model, find_experts(model), settings)
        return
    with pytest.raises(ConfigError, match=r"batched_mm' on cuda:0.*grouped_mm"):
        prepare.prepare_model(model, find_experts(model), settings)
