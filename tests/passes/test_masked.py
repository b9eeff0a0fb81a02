"""One product over all experts, most of them handed zeros: the same bits from those that are not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import passes
from passes import ops
from passes.masked_rows import find_rows
from tests.fakes.masked_block import make_masked
from tests.fakes.traced_block import FakeCounter, permuted, trace

from .conftest import hidden


def rewritten(traced, **fake):
    sites = traced.sites()
    layer = permuted(traced.params, **fake)
    passes.stream_in_waves(traced.gm.graph, sites=sites, banks={"layer": layer.bank})
    return traced, sites, layer


@pytest.mark.parametrize("sizes", [(16, 24), (64, 128)], ids=["ends of tensors", "whole vectors"])
@pytest.mark.parametrize(("tokens", "turned"), [(1, False), (16, True), (33, False)])
def test_rows_that_are_not_zero_are_all_there_is_to_compute(dtype, sizes, tokens, turned):
    block = make_masked(dtype, hidden=sizes[0], inner=sizes[1], top_k=2, turned=turned)
    traced = trace(block, hidden(tokens, dtype, sizes[0]))
    want = traced.copy().run()
    for wave in (0, 1, 3):
        served, (site,), layer = rewritten(traced.copy(), wave=wave)
        assert torch.equal(served.run({site.bank: layer.bank_SN}), want), wave
    core = next(node.args[2] for node in served.gm.graph.nodes if node.target is ops.stream_masked)
    assert ops._CORES[core].pairs_independent == (sizes == (64, 128))


@pytest.mark.parametrize("experts", [2, 16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_sums_that_cancel_come_out_the_same(dtype, experts, tokens):
    """w and -w in random places: any other order of a sum shows in nearly every element."""
    block = make_masked(dtype, num_experts=experts, hidden=128, inner=192)
    for weight in (block.experts.gate_up_proj, block.experts.down_proj):
        half = weight[:, : weight.shape[1] // 2]
        weight.copy_(torch.cat([half, -half], 1)[:, torch.randperm(weight.shape[1])] * 100)
    traced = trace(block, hidden(tokens, dtype, 128))
    want = traced.copy().run()
    served, (site,), layer = rewritten(traced, wave=1)
    assert torch.equal(served.run({site.bank: layer.bank_SN}), want)


def test_the_stacked_weights_are_gone_from_the_graph():
    traced, (site,), _ = rewritten(trace(make_masked(), hidden(7), dynamic=True))
    counts = passes.inspect.op_counts(traced.gm.graph)
    assert counts["stream_masked"] == 1 and "bmm" not in counts
    assert not list(site.weights.values())[1].users


def test_an_expert_without_a_token_is_not_asked_for():
    block = make_masked()
    x = hidden(2)
    traced, (site,), layer = rewritten(trace(block, x))
    heard, stream = [], layer.stream
    layer.stream = lambda x, ids, core, others: (heard.append(ids.tolist()), stream(x, ids, core, others))[1]
    traced.run({site.bank: layer.bank_SN})
    ids = (x @ block.router.t()).argmax(-1)
    assert heard == [sorted(ids.tolist())]


def test_zeros_alone_ask_for_nobody():
    traced, (site,), layer = rewritten(trace(make_masked(), hidden(3)))
    traced.inputs = [torch.zeros(3, 16) if x is not None and x.shape == (3, 16) else x for x in traced.inputs]
    assert not traced.run({site.bank: layer.bank_SN}).any() and not layer.calls


def test_a_row_that_is_no_number_is_not_zero():
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = float("nan")
    x[0, 1, 0] = -0.0
    assert find_rows(x).tolist() == [5]


BETWEEN = {
    "adds one": lambda y: functional.silu(y[..., :24]) + 1,
    "makes something of nothing": lambda y: y[..., :24].exp(),
    "is no number at zero": lambda y: y[..., :24].log() * y[..., 24:],
    "looks at the token before": lambda y: y[..., :24].cumsum(1),
    "takes some of the tokens": lambda y: y[:, 0:2, :24],
    "averages over tokens": lambda y: y[..., :24] - y[..., :24].mean(1, keepdim=True),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_code_that_zeros_do_not_pass_through_is_refused(between):
    with pytest.raises(passes.UnknownUse, match="layer"):
        rewritten(trace(make_masked(combine=BETWEEN[between]), hidden(7)))


def test_what_makes_zeros_of_zeros_is_let_through():
    block = make_masked(combine=lambda y: (y[..., :24].clamp(max=7.0) + 1) * functional.gelu(y[..., 24:]))
    x = hidden(7)
    traced = trace(block, x)
    want = traced.copy().run()
    traced, (site,), layer = rewritten(traced, wave=1)
    assert torch.equal(traced.run({site.bank: layer.bank_SN}), want)


def test_experts_are_counted_where_nothing_is_rewritten():
    block = make_masked()
    x = hidden(9)
    traced = trace(block, x)
    want, (site,) = traced.copy().run(), traced.sites()
    counter = FakeCounter()
    ops.bind(traced.params["gate_up_proj"], counter)
    passes.run_passes(traced.gm.graph, passes.observe_pipeline([site]))
    assert torch.equal(traced.run(), want)
    assert sorted(counter.seen) == sorted((x @ block.router.t()).argmax(-1).tolist())
