"""Fast products: put in place of the exact ones where pairs are few, and nowhere else."""

from __future__ import annotations

import pytest
import torch

import passes
from passes import ops
from tests.fakes.traced_block import permuted, trace

from .conftest import K, hidden, make_block


@pytest.fixture
def asked(monkeypatch):
    """How many pairs each fast product was asked for; it answers as the exact one."""
    seen: list[int] = []

    def fast(x, weight, slots):
        seen.append(len(slots))
        return ops.grouped_mm(x, weight, slots)

    monkeypatch.setattr(ops, "_CORES", [])
    with torch.library._scoped_library("moe_offload", "IMPL") as library:
        library.impl("fast_grouped_mm", fast, "CPU", allow_override=True)
        yield seen


def rewritten(tokens, few_pairs, implementation="grouped_mm", overlap=False, **layer):
    traced = trace(make_block("plain", implementation, torch.bfloat16, (128, 192)), hidden(tokens, torch.bfloat16, 128))
    want, served = traced.run(), permuted(traced.params, **layer)
    sites, banks = traced.sites(), {"layer": served.bank}
    found = passes.offload_pipeline(sites, banks, overlap=overlap, few_pairs=few_pairs)
    passes.run_passes(traced.gm.graph, found)
    traced.gm.recompile()
    assert torch.equal(traced.run({sites[0].bank: served.bank_SN}), want)
    return traced.gm.graph


@pytest.mark.parametrize("overlap", [False, True])
def test_few_pairs_have_fast_products(asked, overlap):
    graph = rewritten(2, {"layer": 2 * K}, overlap=overlap)
    assert asked == [2 * K, 2 * K]
    assert passes.inspect.op_counts(graph)["fast_grouped_mm"] == (0 if overlap else 2), "in waves, they are in the core"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("few_pairs", [None, {}, {"layer": 2 * K - 1}, {"another": 99}])
def test_more_pairs_are_left_alone(asked, overlap, few_pairs):
    rewritten(2, few_pairs, overlap=overlap)
    assert asked == []


def test_all_waves_of_few_pairs_are_fast_and_none_of_many(asked):
    """A prompt is exact however few of its pairs wait for one row."""
    rewritten(5, {"layer": 4 * K}, overlap=True, wave=1)
    assert asked == []
    rewritten(4, {"layer": 4 * K}, overlap=True, wave=1)
    assert sum(asked) == 2 * 4 * K and len(asked) > 2


def test_batched_products_stay(asked):
    rewritten(1, {"layer": K}, implementation="batched_mm")
    rewritten(1, {"layer": K}, implementation="batched_mm", overlap=True)
    assert asked == []


def test_without_a_kernel_the_fast_product_is_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(2, 8, 6, generator=generator)
    slots = torch.tensor([1, 1, 0])
    assert torch.equal(ops.fast_grouped_mm(x, weight, slots), ops.grouped_mm(x, weight, slots))
