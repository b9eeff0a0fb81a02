"""Decode decided by the device, on a CPU: the same tokens and logits, the host's own decisions, no op that waits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import moe_offload
from moe_offload import ConfigError, OffloadConfig, RoutingError, TraceError
from moe_offload.apps.families.tiny import build
from moe_offload.runtime.assemble import on_device
from moe_offload.runtime.kernels.state import REFUSED
from passes import ops
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, resident, say

DEVICE = replace(SETTINGS, decide="device")
HOST = replace(SETTINGS, decide="host", policy="decayed_lfu", overlap=False)
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
WAITS = ("item", "tolist", "nonzero", "masked_select", "unique", "cpu", "numpy")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def decided(family=QWEN, settings=DEVICE, layers=2, residency=0.5, **options):
    model = build(family, num_hidden_layers=layers)
    return offload(model, residency, config=settings, device_map="cpu", **options)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        (QWEN, "grouped_mm"),
        ("gpt_oss", "batched_mm"),
        pytest.param(QWEN, "batched_mm", marks=pytest.mark.long),
        pytest.param("gpt_oss", "grouped_mm", marks=pytest.mark.long),
        pytest.param("deepseek_v3", "grouped_mm", marks=pytest.mark.long),
    ],
)
def test_tokens_logits_and_decisions_are_those_of_the_host(family, implementation):
    plain = build(family, num_hidden_layers=2)
    plain.set_experts_implementation(implementation)
    with torch.no_grad():
        want = plain(say(plain)).logits
    said, seen = [], []
    for settings in (DEVICE, HOST):
        torch._dynamo.reset()
        model = decided(family, replace(settings, experts_implementation=implementation))
        said.append(say(model))
        stats, profile = model.moe_offload.stats(), model.moe_offload.profile()
        seen.append((stats.hits, stats.misses, stats.bytes_read, stats.tokens, profile.counts))
        assert torch.equal(model(said[0]).logits, want), settings.decide
        caches = [layer.cache for layer in model.moe_offload._runtime.layers]
        seen[-1] += ([cache.expert_at for cache in caches], [cache.policy.rate.used for cache in caches])
        model.moe_offload.close()
    assert torch.equal(*said) and seen[0] == seen[1]
    assert seen[0][1] > 0, "nothing was missed: nothing was shown"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_op_of_a_decode_graph_waits_for_the_device(family, monkeypatch):
    from moe_offload.forward.graphs import compiling

    graphs = []
    monkeypatch.setattr(compiling, "run_graph", lambda gm, inputs: graphs.append(gm) or gm.forward)
    model = decided(family)
    say(model)
    decode = [gm for gm in graphs if any(node.target is ops.place for node in gm.graph.nodes)]
    assert decode
    for gm in decode:
        calls = [node for node in gm.graph.nodes if node.op.startswith("call_")]
        assert sum(node.target is ops.place for node in calls) == len(model.moe_offload.moe_layers)
        for node in calls:
            tags = getattr(node.target, "tags", ())
            assert torch.Tag.cudagraph_unsafe not in tags, node.format_node()
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            number = (
                node.args and getattr(node.args[0], "op", "") == "placeholder" and node.args[0].meta["example_value"]
            )
            if name == "item" and number.ndim == 0:
                continue  # a float of some module, which Dynamo passes in: it is the host's
            assert name.partition(".")[0] not in WAITS, node.format_node()
    model.moe_offload.close()


@pytest.mark.long
def test_through_inductor():
    want = say(resident(layers=2))
    model = decided(settings=replace(DEVICE, compile="inductor"))
    assert torch.equal(say(model), want)
    model.moe_offload.close()


def test_hands_change_at_prompts_and_foreign_calls():
    """A second request prefills on the host in between; a submodule call in the middle goes past every pass."""
    plain, model = resident(layers=2), decided()
    for ids in (IDS, IDS.flip(1), IDS + 3):
        print("IDS", ids)
        torch.testing.assert_close(say(model, ids), say(plain, ids), rtol=0, atol=0)
        with torch.no_grad():
            inner = model.model(ids).last_hidden_state
            torch.testing.assert_close(inner, plain.model(ids).last_hidden_state, rtol=0, atol=1e-5)
    model.moe_offload.close()


def test_a_profile_is_taken_over(tmp_path):
    model = decided()
    want = say(model)
    path = model.moe_offload.save_profile(tmp_path / "p.json")
    model.moe_offload.close()
    warm = decided(profile=path)
    assert warm.moe_offload.stats().prewarm_bytes > 0
    assert torch.equal(say(warm), want)
    warm.moe_offload.close()


def test_poisoned_slots_show_a_row_that_was_not_gathered(monkeypatch):
    """The mutation that this file must notice: a gather that leaves out its last row."""
    from moe_offload.runtime.kernels import reference

    whole = reference.gather

    def short(rows_EN, bank_SN, loads):
        last = (loads.count_1 - 1).clamp(min=0).long()
        loads.slot_P.index_fill_(0, last, -1)
        whole(rows_EN, bank_SN, loads)

    model = decided(residency=0.0)
    want = say(model)
    model.moe_offload.close()
    monkeypatch.setattr(reference, "gather", short)
    model = decided(residency=0.0)
    assert not torch.equal(say(model), want)
    model.moe_offload.close()


def test_an_expert_that_does_not_exist_is_an_error(monkeypatch):
    model = decided()
    say(model)
    cache = model.moe_offload._runtime.device_caches.caches[1]
    known = cache.kernels
    broken = known._replace(decide=lambda ids, *rest: known.decide(torch.full_like(ids, 10**6), *rest))
    monkeypatch.setattr(cache, "kernels", broken)
    with pytest.raises(RoutingError, match=r"layers\.1.*outside 0\.\."):
        say(model)
    monkeypatch.undo()
    assert torch.equal(say(model), say(resident(layers=2))), "the next call works"
    model.moe_offload.close()


@pytest.mark.parametrize("kernel", ["decide", "gather"])
def test_a_step_that_is_interrupted_leaves_no_slot_with_another_row(kernel):
    """Between the decision and the copy the tables name rows that are not there."""
    model = decided(residency=0.0)
    want = say(model)
    cache = model.moe_offload._runtime.device_caches.caches[1]
    known = cache.kernels

    def interrupted(*arguments):
        if kernel == "decide":
            known.decide(*arguments)
        if arguments[2].count_1:  # something is to be loaded, and will not be
            raise KeyboardInterrupt
        return getattr(known, kernel)(*arguments)

    cache.kernels = known._replace(**{kernel: interrupted})
    with pytest.raises(KeyboardInterrupt):
        say(model, IDS.flip(1))
    cache.kernels = known
    assert_slots_hold_their_experts(cache)
    assert torch.equal(say(model), want)
    model.moe_offload.close()


def assert_slots_hold_their_experts(cache):
    for expert, slot in enumerate(cache.state.slot_of_E.tolist()):
        row = cache.arrivals.slots.bank_SN[slot]
        assert slot < 0 or torch.equal(row, cache.rows_EN[expert]), f"slot {slot} is not expert {expert}"


def test_an_event_of_the_host_that_never_waited_is_given_up_when_the_device_takes_over():
    """Ctrl-C between fetch and wait: its rows would arrive in slots that the device has given to others."""
    model = decided(residency=0.0)
    want = say(model)
    caches = model.moe_offload._runtime.device_caches
    layer = model.moe_offload._runtime.layers[1]
    caches.hand_back()
    absent = [e for e in range(layer.cache.num_experts) if layer.cache.slot_of[e] < 0][: layer.moe.top_k]
    layer.fetch(torch.tensor(absent))
    assert layer.arrivals.under_way
    caches.take_over([layer.moe.top_k])
    assert not layer.arrivals.under_way and not layer.arrivals.transfer.under_way()
    assert_slots_hold_their_experts(layer.device_cache)
    assert torch.equal(say(model), want)
    model.moe_offload.close()


def test_what_the_device_refused_is_told_once(monkeypatch):
    """Once the host decides, what was seen of it is out of date: the copy that brings news may be a forward late."""
    model = decided()
    say(model)
    caches = model.moe_offload._runtime.device_caches
    caches._block.totals_L4[0, REFUSED] = 3
    with pytest.raises(RoutingError, match="asked 3 times"):
        caches.end_step()
    caches.take_over([model.moe_offload._runtime.layers[0].moe.top_k])
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *args, **options: self)  # nothing has arrived yet
    caches.end_step()
    assert caches.in_charge, "nothing has been refused since"
    monkeypatch.undo()
    model.moe_offload.close()


def test_the_device_decides_by_itself_where_it_is_a_gpu_that_can_read_the_rows():
    def by(settings, tiers, device, slots=4):
        return on_device(settings, [SimpleNamespace(num_experts=8, called=False)] * 2, [slots] * 2, tiers, device)

    assert by(OffloadConfig(), ["host", "host"], "cuda:0") == [True, True]
    assert by(OffloadConfig(), ["host", "disk"], "cuda:0") == [True, False]
    assert by(OffloadConfig(), ["host", "disk"], "cuda:0", slots=8) == [True, True], "every row has a slot"
    assert by(OffloadConfig(policy="lru"), ["host", "host"], "cuda:0") == [False, False]
    assert by(OffloadConfig(), ["host", "host"], "cpu") == [False, False]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (replace(DEVICE, policy="lru"), "not 'lru'"),
    ],
)
def test_what_the_device_cannot_do_is_refused_before_anything_is_changed(settings, says):
    model = build(QWEN, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=says):
        offload(model, config=settings, device_map="cpu")
    assert say(model).numel() and not hasattr(model, "moe_offload")


def test_a_trace_needs_the_host():
    model = decided()
    with pytest.raises(TraceError, match="'decide': 'host'"):
        model.moe_offload.start_trace()
    model.moe_offload.close()


def test_the_setting_has_three_values():
    with pytest.raises(ConfigError, match="decide='gpu'"):
        moe_offload.OffloadConfig(decide="gpu")


def test_a_model_that_was_offloaded_in_inference_mode_decodes_outside_of_it():
    with torch.inference_mode():
        model = decided(layers=1, settings=replace(DEVICE, lookahead=True))
    want = say(build(QWEN, num_hidden_layers=1))
    assert torch.equal(say(model), want) and model.moe_offload.stats().by_device
    with torch.inference_mode():
        assert torch.equal(say(model), want)
    model.moe_offload.close()
