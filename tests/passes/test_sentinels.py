"""The guards of expert parallelism: what transformers up to 5.20 puts into every layer, and later ones only there."""

from __future__ import annotations

import pytest
import torch

import moe_offload
from moe_offload import RoutingError
from moe_offload.apps.families.tiny import build
from moe_offload.experts import is_experts
from tests.fakes.offloaded import QWEN, offload, resident, say


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def guarded(model):
    """As if transformers were 5.17; and a count of what the guards do to the graph."""
    for module in filter(is_experts, model.modules()):
        module._is_expert_parallel = True
    return model


@pytest.mark.parametrize("overlap", [True, False])
def test_a_guarded_model_says_the_same(overlap):
    want = say(guarded(resident(layers=2)))
    settings = moe_offload.OffloadConfig(
        experts_implementation="grouped_mm", compile="graph", poison=True, kv_tokens=64, wave_rows=1, overlap=overlap
    )
    model = guarded(offload(build(QWEN, num_hidden_layers=2), 0.5, config=settings))
    assert torch.equal(say(model), want)
    by_name = [{report.name: report.sites for report in graph} for graph in model.moe_offload.graphs]
    assert by_name and all(len(reports["sentinels"]) == 2 for reports in by_name)
    model.moe_offload.close()


def test_an_id_that_is_not_mine_is_refused_not_clamped(monkeypatch):
    """Without the guards it would be the last expert's: it must be an error."""
    model = guarded(offload(build(QWEN, num_hidden_layers=1)))
    router = type(model.model.layers[0].mlp.gate)
    route = router.forward

    def elsewhere(self, *args):
        *rest, ids = route(self, *args)
        return *rest, torch.full_like(ids, self.num_experts)

    monkeypatch.setattr(router, "forward", elsewhere)
    with pytest.raises(RoutingError, match="asked for expert 8"):
        say(model)
    model.moe_offload.close()
