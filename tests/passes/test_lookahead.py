"""Look-ahead: what is asked early is the next layer's own router, of this layer's residual stream, and nothing else.

Whole models are in tests/runtime/test_guesses.py; here the graph of two small layers is looked at.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import passes
from passes import ops
from tests.fakes.traced_block import Traced, identity

from .conftest import E, H, K, hidden, make_block


class Guesses:
    """What a bank is bound to: notes what it is told to expect, and serves the layer as its fake does."""

    def __init__(self, layer):
        self.layer, self.told, self.asked = layer, [], []

    def prefetch(self, ids_P):
        self.told.append(ids_P.flatten().tolist())

    def fetch(self, ids_P):
        self.asked.append(ids_P.flatten().tolist())
        return self.layer.fetch(ids_P)

    def wait(self, slots_P):
        return self.layer.wait(slots_P)

    def place_ahead(self, ids_P, slots_Q):
        self.prefetch(ids_P)
        return slots_Q.clone()

    def place(self, ids_P):
        return self.wait(self.fetch(ids_P))


class Layers(nn.Module):
    """h = h + mix(h); h = h + experts(norm(h)), twice."""

    def __init__(self, implementation: str, noisy: bool = False):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(make_block("plain", implementation) for _ in range(2))
        self.mixes = nn.ModuleList(nn.Linear(H, H).requires_grad_(False) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(H).requires_grad_(False) for _ in range(2))
        self.noisy = noisy

    def forward(self, h):
        for mix, norm, block in zip(self.mixes, self.norms, self.blocks, strict=True):
            h = h + mix(h)
            x = norm(h)
            if self.noisy:
                x = x.add_(1.0)  # an effect: the copy of the router would have it twice
            h = h + block(x)
        return h

    def router_says(self, layer: int, h) -> list[int]:
        scores = self.norms[layer](h) @ self.blocks[layer].router.t()
        return scores.softmax(-1).topk(K).indices.flatten().tolist()


def traced_layers(model: Layers, x) -> tuple[Traced, list[Guesses]]:
    captured = []

    def capture(gm, inputs):
        captured.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=capture, fullgraph=True)(x)
    gm, inputs = captured[0]
    of = {id(p): (i, n) for i, b in enumerate(model.blocks) for n, p in b.experts.named_parameters(recurse=False)}
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    weights = {
        node: passes.Weight(f"layer {of[id(v)][0]}", of[id(v)][1], E)
        for node, v in zip(nodes, inputs, strict=True)
        if id(v) in of
    }
    guesses = [Guesses(identity(dict(block.experts.named_parameters(recurse=False)))) for block in model.blocks]
    return Traced(gm, inputs, weights, {}), guesses


def prefetches(graph) -> list:
    return [node for node in graph.nodes if node.target is ops.prefetch]


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_next_router_is_asked_with_this_layer_s_residual(implementation, tokens):
    model, x = Layers(implementation), hidden(tokens)
    with torch.no_grad():
        want = model(x)
        early = model.router_says(1, x + model.mixes[0](x))
    traced, guesses = traced_layers(model, x)
    sites = traced.sites()
    assert passes.insert_prefetch(traced.gm.graph, sites=sites) == sites[1:]
    (node,) = prefetches(traced.gm.graph)
    order = list(traced.gm.graph.nodes)
    assert order.index(node) < order.index(sites[0].reads[0].node), "before the first layer reads its experts"
    banks = {f"layer {i}": one.layer.bank for i, one in enumerate(guesses)}
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks=banks)
    for one in guesses:
        ops.bind(one.layer.bank_SN, one)
    served = {site.bank: one.layer.bank_SN for site, one in zip(sites, guesses, strict=True)}
    assert torch.equal(traced.run(served), want)
    assert [one.told for one in guesses] == [[], [early]]
    assert len(guesses[0].asked) == len(guesses[1].asked) == 1


def test_one_layer_has_nobody_to_ask_for():
    traced, _ = traced_layers(Layers("batched_mm"), hidden(2))
    first = traced.sites()[:1]
    assert passes.insert_prefetch(traced.gm.graph, sites=first) == [] == prefetches(traced.gm.graph)


def test_a_router_with_an_effect_is_not_copied():
    traced, _ = traced_layers(Layers("batched_mm", noisy=True), hidden(2))
    assert passes.insert_prefetch(traced.gm.graph, sites=traced.sites()) == [] == prefetches(traced.gm.graph)


def test_two_calls_of_one_layer_are_no_two_layers():
    traced, _ = traced_layers(Layers("batched_mm"), hidden(2))
    first, second = traced.sites()
    second.layer = first.layer
    assert passes.insert_prefetch(traced.gm.graph, sites=[first, second]) == []


def test_a_router_is_not_asked_with_a_residual_of_another_dtype():
    traced, _ = traced_layers(Layers("batched_mm"), hidden(2))
    sites = traced.sites()
    residual = passes.lookahead._find_stem(traced.gm.graph, sites[1]).residual
    residual.meta["example_value"] = residual.meta["example_value"].double()
    assert passes.insert_prefetch(traced.gm.graph, sites=sites) == []
