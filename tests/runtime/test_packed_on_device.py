"""Quantised experts where the device decides, on a CPU: plain transformers' logits, and a decode graph that asks nothing of
the host and reads packed rows."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload.apps.families.quantised.kinds import KINDS
from moe_offload.apps.families.session import run_session
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.forward.graphs import compiling
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs
from passes import ops
from tests.fakes.offloaded import SETTINGS
from tests.fakes.quantised_checkpoints import write

SESSION = {"batch": 1, "prompt": 17, "new_tokens": 6}
DEVICE = replace(SETTINGS, decide="device")
FAST = [("mxfp4", "grouped_mm"), ("fp8", "grouped_mm"), ("mxfp4", "batched_mm")]
EACH = [
    pytest.param(
        kind,
        implementation,
        marks=[
            pytest.mark.skipif(bool(KINDS[kind].needs) and importlib.util.find_spec(KINDS[kind].needs) is None, reason=""),
            *([] if (kind, implementation) in FAST else [pytest.mark.long]),
        ],
    )
    for kind in KINDS
    for implementation in ("grouped_mm", "batched_mm")
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def load(folder, settings=DEVICE, residency=0.5):
    found = outline_folder(folder)
    budget = budget_for(residency, layer_shapes(found.moe_layers), sum_costs(found.model, found.moe_layers, settings))
    return moe_offload.from_pretrained(folder, budget, config=settings, device_map="cpu")


@pytest.mark.parametrize(("kind", "implementation"), EACH)
def test_logits_are_plain_transformers(kind, implementation, tmp_path, monkeypatch):
    folder = write(kind, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation).eval()
    want = run_session(plain, "lm", **SESSION)
    graphs = []
    monkeypatch.setattr(compiling, "run_graph", lambda gm, inputs: graphs.append(gm) or gm.forward)
    model = load(folder, replace(DEVICE, experts_implementation=implementation))
    with model.moe_offload as handle:
        for ours, theirs in zip(run_session(model, "lm", **SESSION), want, strict=True):
            assert torch.equal(ours, theirs)
        stats = handle.stats()
        assert stats.misses > 0 and stats.by_device == len(stats.layers) * (SESSION["new_tokens"] - 1)
    decode = [gm for gm in graphs if any(node.target in ops.PLACES for node in gm.graph.nodes)]
    assert decode
    for gm in decode:
        called = [node.target for node in gm.graph.nodes if node.op == "call_function"]
        reads = ops.packed_mm if implementation == "grouped_mm" else ops.unpack
        assert called.count(ops.place) == len(stats.layers) and called.count(reads) == 2 * len(stats.layers)
        assert ops.stream not in called and ops.fetch not in called
        assert not any(torch.Tag.cudagraph_unsafe in getattr(target, "tags", ()) for target in called)
