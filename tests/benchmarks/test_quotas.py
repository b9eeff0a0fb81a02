"""benchmarks/quotas.py: what hindsight deals out is no worse than equal slots, and sees where a layer needs more."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from moe_offload.observe.trace import Trace

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quotas(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("quotas")


def test_the_layer_that_gains_most_gets_the_slots(quotas):
    hits = [np.array([0.0, 1, 2, 3, 4]), np.array([0.0, 10, 20, 21, 22])]
    assert quotas.deal_out(hits, [2, 2], 7) == [3, 4], "two of ten first, then equal ones to the first layer"
    assert quotas.deal_out(hits, [2, 2], 100) == [6, 6], "no more than there are"


def test_a_layer_that_asks_for_one_expert_gives_its_slots_to_one_that_asks_for_many(quotas):
    tokens, experts = 400, 16
    busy = np.random.default_rng(0).integers(0, experts, tokens)
    ids = np.stack([np.zeros(tokens, dtype=np.int64), busy], axis=1)[:, :, None]
    equal, best, slots = quotas.compare_quotas(Trace.of(ids, num_experts=[experts, experts]), 0.25)
    assert slots == [2, 6] and best > equal + 0.05
