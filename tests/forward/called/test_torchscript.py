"""TorchScript, whose compiled functions ask no `__torch_function__` of what they are given."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe_offload.errors import UnsupportedModelError
from tests.fakes import stack_models
from tests.fakes.loop_models import build, offload, prompt, same, session


@torch.jit.script
def product(x, w):
    return x @ w.t()


def test_a_weight_outside_of_its_experts_call_is_refused_by_name():
    model = offload(build(), 0.5)
    block = model.model.layers[1].mlp
    block.run = lambda x, ids, weights: product(x, block.experts[0].w1.weight)[:, :32]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts\.0\.w1\.weight"):
        model(prompt())


@pytest.mark.parametrize("whole", [False, True], ids=["a row", "the stack"])
def test_a_weight_of_a_stack_is_refused_by_name(whole):
    """Before, the product was of elements that are nobody's: tokens that no model says."""
    model = offload(stack_models.build("stacked"), 0.5)
    experts = model.model.layers[1].mlp.experts
    experts.one = lambda e, x: product(x, experts.gate_up_proj if whole else experts.gate_up_proj[e])
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts"):
        model(prompt())


def test_within_a_call_it_gets_the_weights():
    def script(model):
        for expert in model.model.layers[0].mlp.experts:
            expert.forward = lambda x, own=expert: own.w2(functional.silu(product(x, own.w1.weight)))
        return model

    assert same(session(script(build()), prompt()), session(offload(script(build()), 0.5), prompt()))


def test_experts_that_are_compiled_by_it_are_refused():
    model = build()
    experts = model.model.layers[0].mlp.experts
    for e, expert in enumerate(experts):
        experts[e] = torch.jit.trace(expert, torch.ones(1, 32))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts\.0.*torch\.jit"):
        offload(model)
