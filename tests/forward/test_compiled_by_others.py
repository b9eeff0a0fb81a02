"""A torch.compile of the user's own around an offloaded model, with gradients on, as a call by hand has them."""

from __future__ import annotations

import pytest
import torch

from moe_offload import ClosedError, OffloadError
from tests.fakes.offloaded import IDS, offloaded, resident


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
