"""explain(): every rule that decided is told, and every byte that is not offloaded has a reason."""

from __future__ import annotations

import pytest
import torch

from moe_offload.apps.families.tiny import build
from moe_offload.config.settings import OffloadConfig
from moe_offload.experts import find_experts
from moe_offload.plan.arrange import arrange_layers
from moe_offload.plan.explain import explain_arrangement, list_dense_weights
from moe_offload.plan.weights import dense_bytes
from tests.fakes.offloaded import offloaded


def test_rules_of_an_offloaded_model():
    model = offloaded(layers=3, device_map={"": "disk", "model.layers.1": "cpu"})
    text = model.moe_offload.explain()
    assert text.count("    by ") == 3 and 'by "model.layers.1": "cpu"' in text and 'by "": "disk"' in text
    assert "MoE layer 1 (model.layers.1.mlp.experts)" in text and "in RAM" in text and "slots each on cpu" in text
    assert "attention" in text and "routers" in text and "every token" in text
    model.moe_offload.close()


@pytest.mark.parametrize(
    ("family", "has"), [("qwen2_moe", "shared experts"), ("deepseek_v2", "dense feed-forward layers")]
)
def test_all_that_is_kept_has_a_reason(family, has):
    with torch.device("meta"):
        model = build(family)
    moe_layers = find_experts(model)
    rows = list_dense_weights(model, moe_layers)
    assert sum(size for _, size, _ in rows) == dense_bytes(model, moe_layers)
    assert has in {kind for kind, _, _ in rows}


def test_a_plan_for_devices_that_are_not_here():
    with torch.device("meta"):
        model = build("qwen3_moe", num_hidden_layers=2)
    moe_layers = find_experts(model)
    limits = {0: "1GB", 1: "1GB", "cpu": "1GB"}
    text = explain_arrangement(model, moe_layers, arrange_layers(model, moe_layers, OffloadConfig(max_memory=limits)))
    assert "cuda:0" in text and "cuda:1" in text and "RAM: " in text and "every row has a slot" in text
