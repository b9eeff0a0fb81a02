"""Counting: every pair is seen once, and the result is what it was."""

from __future__ import annotations

import torch

import passes
from passes import ops
from tests.fakes.traced_block import FakeCounter, identity, trace

from .conftest import K, hidden, make_block


def test_observe_counts_every_pair_and_changes_nothing(block, dtype):
    traced = trace(block, hidden(5, dtype))
    want = traced.run()
    counter = FakeCounter()
    for param in traced.params.values():
        ops.bind(param, counter)
    passes.run_passes(traced.gm.graph, passes.observe_pipeline(traced.sites()))
    assert torch.equal(traced.run(), want)
    scores = hidden(5, dtype) @ block.router.t()
    assert sorted(counter.seen) == sorted(scores.topk(K).indices.flatten().tolist())


def test_observe_leaves_alone_what_a_bank_serves(implementation):
    traced = trace(make_block("plain", implementation), hidden(3))
    sites, banks = traced.sites(), {"layer": identity(traced.params).bank}
    passes.rename_to_slots(traced.gm.graph, sites=sites, banks=banks)
    assert passes.insert_observe(traced.gm.graph, sites=sites) == []
