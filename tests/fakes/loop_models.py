"""Models of `tests/fakes/loops`, plain and offloaded, and what they say."""

from __future__ import annotations

import torch

import moe_offload
from moe_offload import OffloadConfig
from moe_offload.experts import find_experts
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs
from tests.fakes.loops.configuration_loops import LoopsConfig
from tests.fakes.loops.modeling_loops import LOOPS, LoopsForCausalLM

LOOP_NAMES = tuple(LOOPS)
SETTINGS = OffloadConfig(poison=True, kv_tokens=64, wave_rows=1)


def build(loop="hits", dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    model = LoopsForCausalLM._from_config(LoopsConfig(loop=loop, **changes), dtype=dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape) * 0.3)
    return model.eval()


def budget_of(model, residency, settings=SETTINGS):
    moe_layers = find_experts(model)
    return budget_for(residency, layer_shapes(moe_layers), sum_costs(model, moe_layers, settings))


def offload(model, residency=0.0, settings=SETTINGS, **options):
    return moe_offload.optimize(model, budget_of(model, residency, settings), config=settings, **options)


def prompt(batch=1, length=16, seed=1):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def session(model, ids, steps=6):
    """The logits of a prompt and of greedy steps after it."""
    out = model(ids)
    found = [out.logits.clone()]
    for _ in range(steps):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(ids, past_key_values=out.past_key_values)
        found.append(out.logits.clone())
    return found


def same(want, got):
    return len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
