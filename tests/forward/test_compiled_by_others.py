"""A torch.compile of the user's own around an offloaded model: with gradients on, as a call by hand has them; within
autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_offload import ClosedError, OffloadError, UnsupportedModelError
from tests.fakes.offloaded import IDS, SETTINGS, offloaded, resident


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
