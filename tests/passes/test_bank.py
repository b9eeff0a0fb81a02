"""A bank seen as stacked weights: of one dtype, of several, as tensors and as nodes of a graph."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from passes import Bank
from tests.fakes.traced_block import FakeField

SLOTS = 3
ONE_DTYPE = Bank(
    (FakeField("up", (2, 4), torch.float32, 0, 32), FakeField("bias", (2,), torch.float32, 64, 8)), SLOTS, torch.float32
)
MIXED = Bank(
    (FakeField("blocks", (8,), torch.uint8, 0, 8), FakeField("scale", (2,), torch.bfloat16, 64, 4)), SLOTS, torch.uint8
)


def filled(bank: Bank) -> torch.Tensor:
    return torch.arange(SLOTS * 128, dtype=torch.uint8).view(SLOTS, 128).view(bank.dtype)


@pytest.mark.parametrize("bank", [ONE_DTYPE, MIXED], ids=["one dtype", "mixed"])
def test_views_are_each_slot_s_bytes_and_copy_nothing(bank):
    bank_SN = filled(bank)
    for field in bank.fields:
        view = bank.views(bank_SN)[field.name]
        assert view.shape == (SLOTS, *field.shape) and view.dtype == field.dtype
        assert view.untyped_storage().data_ptr() == bank_SN.untyped_storage().data_ptr()
        for slot in range(SLOTS):
            row = bank_SN.view(torch.uint8)[slot, field.offset : field.offset + field.nbytes]
            assert torch.equal(view[slot].contiguous().view(torch.uint8).flatten(), row)


@pytest.mark.parametrize("bank", [ONE_DTYPE, MIXED], ids=["one dtype", "mixed"])
def test_nodes_give_the_same_views(bank):
    graph = Graph()
    nodes = bank.view_nodes(graph, graph.placeholder("bank"), [field.name for field in bank.fields])
    graph.output(tuple(nodes.values()))
    graph.lint()
    got = GraphModule(torch.nn.Module(), graph)(filled(bank))
    want = bank.views(filled(bank))
    assert all(torch.equal(view, want[name]) for name, view in zip(nodes, got, strict=True))


def test_only_what_is_wanted_gets_nodes():
    graph = Graph()
    assert list(ONE_DTYPE.view_nodes(graph, graph.placeholder("bank"), ["bias"])) == ["bias"]
