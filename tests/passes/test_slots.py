"""Decode: ids renamed to slots, bit-equal with every expert in its own slot and in a random one."""

from __future__ import annotations

import pytest
import torch

import passes
from tests.fakes.traced_block import identity, permuted, trace

from .conftest import K, hidden, make_block
from .test_lookahead import Layers, traced_layers

LAYERS = [identity, permuted]


@pytest.mark.parametrize("make_layer", LAYERS)
def test_slots_equal_the_unmodified_graph(block, dtype, make_layer):
    traced = trace(block, hidden(3, dtype))
    want = traced.run()
    layer = make_layer(traced.params)
    sites = traced.sites()
    done = passes.rename_to_slots(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    assert done == sites and len(sites) == 1
    assert torch.equal(traced.run({sites[0].bank: layer.bank_SN}), want)
    assert [call.split()[0] for call in layer.calls] == ["fetch", "wait"]


def test_slots_leave_alone_what_does_not_fit(implementation):
    traced = trace(make_block("plain", implementation), hidden(3))
    before = str(traced.gm.graph)
    bank = identity(traced.params).bank
    small = passes.Bank(bank.fields, 3 * K - 1, bank.dtype)
    assert passes.rename_to_slots(traced.gm.graph, sites=traced.sites(), banks={"layer": small}) == []
    assert str(traced.gm.graph) == before


def test_slots_leave_alone_an_unknown_number_of_tokens(implementation):
    traced = trace(make_block("plain", implementation), hidden(3), dynamic=True)
    assert traced.sites()[0].pairs is None
    banks = {"layer": identity(traced.params).bank}
    assert passes.rename_to_slots(traced.gm.graph, sites=traced.sites(), banks=banks) == []


@pytest.mark.parametrize("fits", [True, False])
def test_the_device_decides_where_every_site_of_the_graph_is_renamed(fits):
    """A site that is left to `waves` takes all layers back to the host in the middle of the graph."""
    traced, (first, second) = traced_layers(Layers("batched_mm"), hidden(2))
    sites = traced.sites()
    banks = {"layer 0": first.layer.bank, "layer 1": second.layer.bank}
    if not fits:
        bank = banks["layer 1"]
        banks["layer 1"] = passes.Bank(bank.fields, 2 * K - 1, bank.dtype)
    done = passes.rename_to_slots(traced.gm.graph, sites=sites, banks=banks, on_device=list(banks))
    counts = passes.inspect.op_counts(traced.gm.graph)
    assert done == (sites if fits else sites[:1])
    assert (counts.get("place", 0), counts.get("fetch", 0)) == ((2, 0) if fits else (0, 1))
