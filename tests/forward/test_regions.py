"""Regions: two graphs for all layers, and a model that is eager code in all else."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace

import pytest
import torch

from moe_offload.forward import dynamo, regions
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offloaded, resident, say


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", dynamo.VERSIONS_ARE_CACHED)
        yield


def kinds_of_calls(layers):
    """Calls that were a graph each when the whole model was traced."""
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    yield {"input_ids": IDS}
    yield {"input_ids": IDS[:, :1]}
    yield {"input_ids": IDS, "attention_mask": mask}
    yield {"input_ids": IDS.repeat(3, 1)}
    yield {"input_ids": IDS[:, :7], "use_cache": False}
    yield {"input_ids": IDS, "output_hidden_states": True}
    yield {"input_ids": IDS, "labels": IDS}
    yield {"inputs_embeds": torch.ones(1, 5, layers.config.hidden_size)}
    yield {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1])[None] + 4}
    yield {"input_ids": IDS, "logits_to_keep": 1}
    yield {"input_ids": IDS, "return_dict": False}


@pytest.mark.parametrize("layers", [1, 5])
def test_two_graphs_serve_all_layers_and_all_kinds_of_calls(layers):
    plain, model = resident(layers=layers), offloaded(layers=layers)
    with torch.no_grad():
        for call in kinds_of_calls(plain):
            want, got = plain(**call), model(**call)
            assert torch.equal(want[0], got[0]) and len(want) == len(got), call
            if "output_hidden_states" in call:
                assert all(map(torch.equal, want.hidden_states, got.hidden_states))
    assert torch.equal(say(model), say(plain))
    assert model.moe_offload.stats().graphs == 2
    assert model.moe_offload.stats().events == layers * (11 + 20)
    model.moe_offload.close()


def test_what_was_traced_goes_with_its_model():
    """Not so where a report holds a node of a graph, or where Dynamo keeps code and graphs alive for each other."""

    def use_one_more() -> int:
        model = offloaded()
        say(model, n=2)
        model.moe_offload.close()
        del model
        gc.collect()
        return sum(type(thing) is torch.fx.Graph for thing in gc.get_objects())

    use_one_more()
    before = use_one_more()
    assert use_one_more() <= before
    assert not [name for name in vars(regions) if "compiled_fn" in name], "Dynamo keeps what it compiles in globals"


def test_a_part_of_the_model_runs_in_the_same_graphs():
    plain, model = resident(layers=2), offloaded(layers=2)
    with torch.no_grad():
        model(IDS)
        x = plain.model.embed_tokens(IDS)
        assert torch.equal(model.model(IDS)[0], plain.model(IDS)[0])
        assert torch.equal(model.model.layers[1].mlp(x), plain.model.layers[1].mlp(x))
    assert model.moe_offload.stats().graphs == 1
    model.moe_offload.close()


def test_graphs_are_made_anew_where_kinds_become_more_than_dynamo_keeps(monkeypatch, recwarn):
    monkeypatch.setattr(regions, "MOST_GRAPHS", 3)
    monkeypatch.setattr(dynamo, "MOST_GRAPHS", 3)
    plain, model = resident(layers=1), offloaded(layers=1)
    act = [each.model.layers[0].mlp.experts.act_fn for each in (plain, model)]
    with torch.no_grad():
        for number in range(8):
            for one in act:
                one.kind = number
                one.register_forward_hook(lambda module, args, out: out * (1 + module.kind))
            assert torch.equal(model(IDS).logits, plain(IDS).logits), number
    assert model.moe_offload.stats().graphs >= 8 and not recwarn.list
    model.moe_offload.close()


def break_graph(ids):
    torch._dynamo.graph_break()
    return ids


def test_a_region_that_cannot_be_traced_runs_as_one_op_and_says_so_once(caplog, monkeypatch):
    plain, model = resident(layers=2), offloaded(layers=2)
    monkeypatch.setattr(regions.ops, "mark_unserved", break_graph)
    assert torch.equal(say(model), say(plain))
    assert len([r for r in caplog.records if "cannot be traced" in r.getMessage()]) == 1
    assert model.moe_offload.stats().graphs == 0 and model.moe_offload.stats().hits
    model.moe_offload.close()


def test_dynamo_may_be_switched_off_or_reset():
    plain, model = resident(layers=2), offloaded(layers=2)
    want = say(plain)
    with torch._dynamo.config.patch(disable=True):
        assert torch.equal(say(model), want)
    assert torch.equal(torch.compiler.disable(lambda: say(model))(), want)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(say(model), want)
    assert torch.equal(say(model), want)
    torch._dynamo.reset()
    assert torch.equal(say(model), want)
    model.moe_offload.close()


@pytest.mark.parametrize("settings", [replace(SETTINGS, overlap=False), replace(SETTINGS, dynamic=False)])
def test_other_settings(settings):
    plain, model = resident(layers=2), offloaded(layers=2, config=settings)
    assert torch.equal(say(model), say(plain))
    model.moe_offload.close()


def test_experts_of_other_shapes_in_one_model_have_graphs_of_their_own():
    plain, model = resident("gpt_oss", layers=3), offloaded("gpt_oss", layers=3)
    assert torch.equal(say(model), say(plain))
    assert model.moe_offload.stats().graphs == 2
    model.moe_offload.close()


def test_the_graph_is_whole_where_a_router_is_asked_early():
    model = offloaded(QWEN, layers=2, config=replace(SETTINGS, lookahead=True))
    assert torch.equal(say(model), say(resident(layers=2)))
    assert any(
        report.name == "insert_prefetch" and report.layers for graph in model.moe_offload.graphs for report in graph
    )
    model.moe_offload.close()
