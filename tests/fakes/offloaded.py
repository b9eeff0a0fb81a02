"""One tiny model twice: as transformers made it, and offloaded to the least that works."""

from __future__ import annotations

import torch

import moe_offload
from moe_offload import OffloadConfig
from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts, is_experts
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs

SETTINGS = OffloadConfig(experts_implementation="grouped_mm", compile="graph", poison=True, kv_tokens=64, wave_rows=1)
IDS = torch.arange(3, 15).view(1, -1)
QWEN = "qwen3_moe"


def resident(family=QWEN, layers=1, **options):
    """The unmodified model, with the same experts implementation as the offloaded one."""
    model = build(family, num_hidden_layers=layers, **options)
    for module in filter(is_experts, model.modules()):
        module.config._experts_implementation = "grouped_mm"
    return model


def offload(model, residency=0.0, **options):
    moe_layers = find_experts(model)
    budget = budget_for(residency, layer_shapes(moe_layers), sum_costs(model, moe_layers, SETTINGS))
    return moe_offload.optimize(model, **{"budget": budget, "config": SETTINGS, **options})


def offloaded(family=QWEN, seed=0, layers=1, **options):
    return offload(build(family, seed=seed, num_hidden_layers=layers), **options)


def say(model, ids=IDS, n=20):
    return model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0)
