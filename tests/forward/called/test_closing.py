"""A model that ends in the middle of a call of its own: a hook closes it, or nobody holds it but a part that runs."""

from __future__ import annotations

import gc

import pytest
import torch

from moe_offload.errors import ClosedError
from tests.fakes import offloaded, stack_models
from tests.fakes.loop_models import build, offload, prompt

MAKE = {
    "modules": (build, lambda model: offload(model, 0.5)),
    "stacks": (lambda: stack_models.build(next(iter(stack_models.STACK_LOOPS))), lambda model: offload(model, 0.5)),
    "interface": (lambda: offloaded.resident(layers=2), offloaded.offload),
}


@pytest.mark.parametrize("form", MAKE)
@torch.no_grad()
def test_a_call_that_closes_the_model_ends_first(form):
    make, offload_it = MAKE[form]
    want = make()(prompt()).logits
    model = offload_it(make())
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: model.moe_offload.close())
    assert torch.equal(want, model(prompt()).logits) and model.moe_offload.closed
    hook.remove()
    with pytest.raises(ClosedError):
        model(prompt())


@torch.no_grad()
def test_an_expert_ends_its_call_though_its_model_is_collected_meanwhile():
    holder, x = [offload(build(), 0.5)], torch.randn(2, 32)
    want = build().model.layers[1].mlp.experts[2](x)
    expert = holder[0].model.layers[1].mlp.experts[2]
    expert.w1.register_forward_pre_hook(lambda *_: (holder.clear(), gc.collect(), None)[-1])
    assert torch.equal(want, expert(x))
    with pytest.raises(ClosedError):
        expert(x)
