"""Recorded ids in place of the router's: by the tables on the device, against the trace itself read row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_offload import OffloadConfig, from_pretrained
from moe_offload.apps.bench.request import ask_model
from moe_offload.apps.bench.routing import Recorded, Routing, install_routing
from moe_offload.apps.bench.synthetic import make_synthetic
from moe_offload.errors import ConfigError

LAYERS, K, EXPERTS, ROWS = 3, 2, 8, 11


def trace(layers: int = LAYERS, experts: int = EXPERTS, k: int = K) -> Recorded:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randperm(experts, generator=generator)[:k] for _ in range(ROWS * layers)]
    return Recorded(torch.stack(ids).view(ROWS, layers, k), "")


def by_the_host(recorded: Recorded, row: int, tokens: int, layer: int) -> torch.Tensor:
    """What a call gives by the definition: rows `row` on, begun anew at the end."""
    return recorded.ids_TLK[torch.arange(row, row + tokens) % ROWS, layer]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_replay_goes_on_from_step_to_step_and_begins_anew(dtype):
    recorded = trace()
    routing = Routing(recorded, [K] * LAYERS, tokens=20, device="cpu")
    for begin in (9, 0, 5):  # requests: the last of them must not see what the first left
        routing.seek(begin, 12)
        row = begin
        for tokens in (4, *[1] * 8):
            for layer in range(LAYERS):
                got = routing(torch.full((tokens, K), 7, dtype=dtype), layer)
                assert got.dtype == dtype
                assert torch.equal(got.long(), by_the_host(recorded, row, tokens, layer))
            row += tokens
        used = routing.used(prompt_tokens=4, steps=8)
        assert [len(events) for events in used] == [9] * LAYERS
        assert used[1][0] == sorted(set(by_the_host(recorded, begin, 4, 1).flatten().tolist()))
        assert used[2][8] == sorted(by_the_host(recorded, row - 1, 1, 2).flatten().tolist())


def test_the_routers_own_ids_pass_and_are_noted():
    routing = Routing(None, [K] * LAYERS, tokens=3, device="cpu")
    routing.seek(5, 3)
    for ids in (torch.tensor([[1, 2], [2, 3]]), torch.tensor([[7, 0]])):
        for layer in range(LAYERS):
            got = routing(ids, layer)
            assert torch.equal(got, ids) and got.data_ptr() != ids.data_ptr()
    assert routing.used(2, 1) == [[[1, 2, 3], [0, 7]]] * LAYERS


def test_a_step_launches_what_reads_its_place_on_the_device():
    """Recorded and replayed, a step finds its place on the device: nothing of it is a constant of the host's."""
    recorded = trace()
    routing = Routing(recorded, [K], tokens=8, device="cpu")
    routing.seek(0, 8)
    ids = torch.zeros((1, K), dtype=torch.int64)
    step = torch.fx.experimental.proxy_tensor.make_fx(lambda ids: routing(ids, 0))(ids)
    assert not [node for node in step.graph.nodes if node.target is torch.ops.aten._local_scalar_dense.default]
    routing.seek(0, 8)
    replayed = torch.cat([step(ids) for _ in range(5)])
    assert torch.equal(replayed, by_the_host(recorded, 0, 5, 0))


class Experts(nn.Module):
    def forward(self, hidden, ids, weights):
        return hidden + ids.sum()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Experts(), Experts()

    def forward(self, hidden, ids):
        return self.b(self.a(hidden, ids, None), ids, None)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_neither_drops_nor_joins_calls(backend):
    recorded = trace()
    routing = Routing(recorded, [K] * 2, tokens=8, device="cpu")
    model = Model()
    install_routing(model, ["a", "b"], routing)
    step = torch.compile(model, backend=backend, fullgraph=True)
    routing.seek(3, 8)
    for t in range(3, 8):
        want = recorded.ids_TLK[t, :2].sum()
        assert step(torch.zeros(1), torch.zeros((1, K), dtype=torch.int64)) == want
    assert int(routing.token_1) == 5


def test_a_request_too_long_is_refused():
    routing = Routing(trace(), [K], tokens=4, device="cpu")
    with pytest.raises(ConfigError, match="5 tokens"):
        routing.seek(0, 5)


def test_a_device_that_decides_meets_the_recorded_ids(tmp_path):
    """A whole request through ours: the ids of the trace, and the tokens of the resident model over the same ones."""
    from transformers import AutoModelForCausalLM

    layers, experts, k, prompt, steps, row = 2, 32, 4, 6, 4, 7
    recorded = trace(layers, experts, k)
    folder = make_synthetic("tiny", layers, tmp_path)
    config = OffloadConfig(
        decide="device",
        policy="decayed_lfu",
        device_map={"": "cpu", "model.layers.*.mlp.experts": "cpu"},
        max_memory={"cpu": "12MB"},
        reserve=0,
    )
    answers = []
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(),
        lambda: from_pretrained(folder, "3MB", config=config),
    ):
        model = load()
        routing = Routing(recorded, [k] * layers, tokens=prompt + steps, device="cpu")
        install_routing(model, [f"model.layers.{layer}.mlp.experts" for layer in range(layers)], routing)
        routing.seek(row, prompt + steps)
        answers.append(
            ask_model(model, list(range(prompt)), steps, cache_implementation="static", disable_compile=True)
        )
    assert answers[0].tokens == answers[1].tokens
    assert model.moe_offload.stats().by_device == steps * layers
    assert routing.used(prompt, steps)[1][3] == sorted(by_the_host(recorded, row + prompt + 2, 1, 1)[0].tolist())
    rows = [by_the_host(recorded, row, prompt + steps, layer).flatten() for layer in range(layers)]
    assert model.moe_offload.profile().counts == [torch.bincount(ids, minlength=experts).tolist() for ids in rows]
    model.moe_offload.close()
