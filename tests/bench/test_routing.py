"""Recorded routing that waits for no host: the same ids as the trace has, call after call and replay after replay."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moe_offload import OffloadConfig, from_pretrained
from moe_offload.bench.request import ask
from moe_offload.bench.routing import Recorded, Routing, install, load_recorded
from moe_offload.bench.synthetic import synthetic
from moe_offload.errors import ConfigError

LAYERS, EXPERTS, K = 3, 32, 4
NAMES = [f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorded:
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("trace") / "recorded.npz"
    np.savez(file, experts=np.stack([[rng.permutation(EXPERTS)[:K] for _ in range(LAYERS)] for _ in range(40)]))
    return load_recorded(file, LAYERS, EXPERTS, K)


def forward(routing: Routing, given_TK: Tensor) -> list[Tensor]:
    return [routing(given_TK, layer) for layer in range(LAYERS)]


def test_replay_goes_on_from_call_to_call_and_begins_anew(recorded):
    routing = Routing(recorded, [K] * LAYERS, tokens=8, device="cpu")
    for row in (38, 3):
        routing.seek(row, 8)
        seen = [forward(routing, torch.zeros((tokens, K), dtype=torch.int64)) for tokens in (5, 1, 1)]
        rows = torch.arange(row, row + 7) % 40
        for layer in range(LAYERS):
            ids_TK = torch.cat([call[layer] for call in seen])
            assert torch.equal(ids_TK, recorded.ids_TLK[rows, layer])
    prompt, *steps = routing.used(5, 2)[1]
    assert prompt == sorted({int(e) for e in recorded.ids_TLK[3:8, 1].flatten()})
    assert steps == [sorted(recorded.ids_TLK[row, 1].tolist()) for row in (8, 9)]


def test_a_recorded_step_gives_other_ids_each_time_it_is_replayed(recorded):
    """As in a CUDA graph: what is recorded is what was done to tensors; nothing of the host runs again."""
    routing = Routing(recorded, [K] * LAYERS, tokens=20, device="cpu")
    given_TK = torch.zeros((1, K), dtype=torch.int64)
    step = make_fx(partial(forward, routing))(given_TK)
    routing.seek(30, 20)
    forward(routing, torch.zeros((5, K), dtype=torch.int64))
    for row in (35, 36, 37, 38, 39, 0, 1):
        for layer, ids_TK in enumerate(step(given_TK)):
            assert torch.equal(ids_TK[0], recorded.ids_TLK[row, layer])


def test_without_a_trace_the_routers_own_ids_are_remembered():
    routing = Routing(None, [2], tokens=4, device="cpu")
    routing.seek(0, 4)
    for ids_TK in ([[5, 1], [1, 2]], [[7, 3]]):
        assert routing(torch.tensor(ids_TK), 0).tolist() == ids_TK
    assert routing.used(2, 1) == [[[1, 2, 5], [3, 7]]]


def test_a_request_beyond_the_room_is_refused(recorded):
    with pytest.raises(ConfigError, match="9 tokens"):
        Routing(recorded, [K] * LAYERS, tokens=8, device="cpu").seek(0, 9)


def test_a_device_that_decides_meets_the_recorded_ids(recorded, tmp_path):
    """A whole request through ours: the ids of the trace, and the tokens of the resident model over the same ones."""
    from transformers import AutoModelForCausalLM

    folder = synthetic("tiny", cache=tmp_path)
    device_map = {"": "cpu", "model.layers.*.mlp.experts": "cpu"}
    settings = OffloadConfig(decide="device", policy="decayed_lfu", device_map=device_map, reserve=0)
    answers = []
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(),
        lambda: from_pretrained(folder, "3MB", config=replace(settings, max_memory={"cpu": "12MB"})),
    ):
        model = load()
        routing = Routing(recorded, [K] * LAYERS, tokens=20, device="cpu")
        install(model, NAMES, routing)
        routing.seek(7, 18)
        answers.append(ask(model, list(range(10)), 8, cache_implementation="static"))
        events = routing.used(10, 8)
    assert answers[0].tokens == answers[1].tokens
    assert model.moe_offload.stats().by_device == 8 * LAYERS
    assert events[2][4] == sorted(recorded.ids_TLK[7 + 10 + 3, 2].tolist())
    counts = [torch.bincount(recorded.ids_TLK[7:25, layer].flatten(), minlength=EXPERTS) for layer in range(LAYERS)]
    assert model.moe_offload.profile().counts == [layer.tolist() for layer in counts]
    model.moe_offload.close()
