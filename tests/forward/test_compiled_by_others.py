"""A torch.compile of the user's own around an offloaded model: with gradients on, as a call by hand has them; within
autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_offload import ClosedError, OffloadError, UnsupportedModelError
from moe_offload.apps.families.tiny import build
from tests.fakes.offloaded import IDS, SETTINGS, offload, offloaded, resident


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_with_gradients_on_the_result_is_exact_and_a_backward_is_refused(backend):
    """Autograd's functional form of a graph copies what an op writes into; a bank was then one that nobody knows."""
    torch._dynamo.reset()
    plain, model = resident(layers=2), offloaded(layers=2)
    compiled = torch.compile(model, backend=backend)
    got = compiled(IDS).logits
    assert torch.equal(got, plain(IDS).logits) and got.requires_grad
    with pytest.raises(OffloadError, match="inference only"):
        got.sum().backward()
    with torch.no_grad():
        assert torch.equal(compiled(IDS).logits, plain(IDS).logits)
        model.moe_offload.close()
        with pytest.raises(ClosedError):
            compiled(IDS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_within_autocast_the_result_is_exact_or_refused(backend):
    """Autocast converts the operands of bmm, and within an op it sees none; what grouped_mm takes it leaves alone."""
    for implementation in ("grouped_mm", "batched_mm"):
        torch._dynamo.reset()
        plain = resident()
        plain.set_experts_implementation(implementation)
        model = offloaded(config=replace(SETTINGS, experts_implementation=implementation))
        compiled = torch.compile(model, backend=backend)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            want = plain(IDS).logits
            assert torch.equal(model(IDS).logits, want), "where nobody compiles it, each product is seen"
            if implementation == "grouped_mm":
                assert torch.equal(compiled(IDS).logits, want)
                continue
            with pytest.raises(UnsupportedModelError, match=r"layers\.0.*within autocast"):
                compiled(IDS)
            with FlopCounterMode(display=False), pytest.raises(UnsupportedModelError, match="within autocast"):
                model(IDS)
        with torch.no_grad():
            assert torch.equal(compiled(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_op_of_last_resort_has_the_bits_of_the_whole_call(implementation):
    """Elementwise kernels round the end of a tensor otherwise, and a pair of 24 elements does not fill a vector: each
    has the place that it has in the whole call, whichever experts are computed with it."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 24}
    plain, ids = build("gpt_oss", **sizes).eval(), torch.arange(99).view(3, 33)
    plain.set_experts_implementation(implementation)
    for residency in (0.0, 1.0):
        config = replace(SETTINGS, experts_implementation=implementation)
        model = offload(build("gpt_oss", **sizes), residency, config=config)
        with torch.no_grad(), FlopCounterMode(display=False):
            assert torch.equal(model(ids).logits, plain(ids).logits), residency
        model.moe_offload.close()


@pytest.mark.long
def test_through_inductor_of_our_own_autocast_is_exact_or_refused():
    torch._dynamo.reset()
    model = offloaded(config=replace(SETTINGS, experts_implementation="batched_mm", compile="inductor"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UnsupportedModelError, match=r"layers\.0.*within autocast"):
            model(IDS)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    model.moe_offload.close()
