"""From map and limits to plans and tiers, on models of which only the shapes exist."""

from __future__ import annotations

import pytest
import torch

from moe_offload.apps.families.tiny import build
from moe_offload.config.settings import OffloadConfig
from moe_offload.errors import BudgetError, ConfigError, UnsupportedModelError
from moe_offload.experts import find_experts
from moe_offload.plan.arrange import arrange_layers
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import (
    CUBLAS_BYTES,
    CUDA_BLOCK_BYTES,
    GRAPHS_BYTES,
    dense_bytes,
    dense_bytes_on,
    layer_shapes,
    sum_costs,
)
from tests.fakes.offloaded import QWEN

EXPERTS = "model.layers.*.mlp.experts"
SETTINGS = OffloadConfig(kv_tokens=64, wave_rows=1, reserve=0)
L = 4


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return build(QWEN, num_hidden_layers=L)


@pytest.fixture(scope="module")
def moe_layers(model):
    return find_experts(model)


def budget_of(model, moe_layers, residency=0.5, device="cpu"):
    return budget_for(residency, layer_shapes(moe_layers), sum_costs(model, moe_layers, SETTINGS, device))


def arranged(model, moe_layers, **said):
    return arrange_layers(model, moe_layers, OffloadConfig(**{**SETTINGS.to_dict(), **said}))


def test_one_device_and_a_budget(model, moe_layers):
    found = arranged(model, moe_layers, budget=budget_of(model, moe_layers))
    assert list(found.plans) == ["cpu"] and found.tiers == ["disk"] * L
    assert found.plan.slots == found.slots and found.host_bytes == 0 and found.host_room_bytes is None


def test_ram_between_budget_and_limit_holds_the_first_layers(model, moe_layers):
    budget, row = budget_of(model, moe_layers), moe_layers[0].nbytes
    found = arranged(model, moe_layers, budget=budget, max_memory={"cpu": budget + 2 * row + 1})
    assert found.tiers == ["host", "host", "disk", "disk"] and found.host_bytes == 2 * row
    assert found.plan.budget_bytes == budget
    alone = arranged(model, moe_layers, max_memory={"cpu": budget + 2 * row})
    assert alone.plan.budget_bytes == budget + 2 * row and alone.tiers == ["disk"] * L
    assert (
        arranged(model, moe_layers, budget=budget, device_map="disk", max_memory={"cpu": "1TB"}).tiers == ["disk"] * L
    )


def test_a_budget_over_the_limit_is_refused(model, moe_layers):
    with pytest.raises(BudgetError, match="is more than max_memory"):
        arranged(model, moe_layers, budget="1GB", max_memory={"cpu": "10MB"})


def test_dense_weights_are_shared_out_completely(model, moe_layers):
    shares = dense_bytes_on(model, moe_layers, lambda name: "1" if name.startswith("model.layers.1") else "0")
    assert sum(shares.values()) == dense_bytes(model, moe_layers) and min(shares.values()) > 0


@pytest.mark.parametrize("device_map", ["auto", {"": 0, "model.layers.2": 1, "model.layers.3": "cuda:1"}])
def test_two_devices_each_have_a_plan_and_a_bank_a_layer(model, moe_layers, device_map):
    budget = budget_of(model, moe_layers, device="cuda:0")
    found = arranged(
        model, moe_layers, device_map=device_map, max_memory={0: budget, 1: budget - 1, "cpu": moe_layers[0].nbytes}
    )
    assert list(found.plans) == ["cuda:0", "cuda:1"]
    assert [spot.device for spot in found.spots] == ["cuda:0"] * 2 + ["cuda:1"] * 2
    for device, size in (("cuda:0", budget), ("cuda:1", budget - 1)):
        plan = found.plans[device]
        assert plan.budget_bytes == size and len(plan.slots) == 2 and plan.unused_bytes >= 0
        assert plan.costs.library_bytes == CUBLAS_BYTES + GRAPHS_BYTES + 2 * CUDA_BLOCK_BYTES
    assert found.slots == found.plans["cuda:0"].slots + found.plans["cuda:1"].slots
    assert sum(plan.costs.dense_bytes for plan in found.plans.values()) == dense_bytes(model, moe_layers)
    with pytest.raises(ConfigError, match="plan of its own"):
        _ = found.plan


def test_experts_beside_the_device_that_computes(model, moe_layers):
    budget = budget_of(model, moe_layers, device="cuda:0")
    found = arranged(model, moe_layers, device_map={"": 0, EXPERTS: "cpu"}, max_memory={0: budget})
    assert found.tiers == ["host"] * L and list(found.plans) == ["cuda:0"]
    assert found.plan.costs.library_bytes == CUBLAS_BYTES + GRAPHS_BYTES + L * CUDA_BLOCK_BYTES
    assert found.plan.slots == arranged(model, moe_layers, budget=budget_of(model, moe_layers)).slots, (
        "which is no expert's room"
    )


def test_what_is_not_said_and_needed_is_asked_for(model, moe_layers):
    with pytest.raises(BudgetError, match="how much of cuda:0"):
        arranged(model, moe_layers, device_map={"": 0})
    with pytest.raises(ConfigError, match="how to share"):
        arranged(model, moe_layers, budget="1GB", device_map={"": 0, "model.layers.1": 1})
    with pytest.raises(BudgetError, match="dense weights on cuda:1"):
        arranged(model, moe_layers, device_map={"": 0, "lm_head": 1}, max_memory={0: "1GB", 1: 5})
    with pytest.raises(UnsupportedModelError, match="computes on cpu only"):
        arrange_layers(model, moe_layers, OffloadConfig(device_map={"": 0}), usable=["cpu"])
