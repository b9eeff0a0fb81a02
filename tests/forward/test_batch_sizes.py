"""Decode steps of several sequences, decided by the device: the resident model's tokens, a graph for each size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_offload.apps.families.tiny import build
from moe_offload.forward import batch_sizes as steps
from moe_offload.forward.batch_sizes import SIZES, Steps, find_cache
from moe_offload.plan import arrange
from moe_offload.plan.budget import plan_slots
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, resident

DEVICE = replace(SETTINGS, decide="device")
PADS = (0, 3, 1, 5, 2)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def prompts(sequences):
    """Of different lengths, padded on the left."""
    ids = torch.cat([(IDS + 7 * i) % 128 for i in range(sequences)])
    mask = torch.ones_like(ids)
    for i, pad in enumerate(PADS[:sequences]):
        ids[i, :pad], mask[i, :pad] = 0, 0
    return ids, mask


def say(model, sequences, n=6):
    ids, mask = prompts(sequences)
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)


def test_batches_are_decided_by_the_device():
    """At 9 of 12 slots, four sequences of two experts each still fit, and five do not."""
    plain = resident(num_experts=12)
    model = offload(build(QWEN, num_hidden_layers=1, num_experts=12), 0.75, config=DEVICE, device_map="cpu")
    assert model.moe_offload._runtime.layers[0].cache.slots == 9
    for sequences, by_device in ((2, 5), (3, 5), (4, 5), (5, 0), (2, 5)):
        before = model.moe_offload.stats()
        assert torch.equal(say(model, sequences), say(plain, sequences)), sequences
        did = model.moe_offload.stats() - before
        assert (did.events, did.by_device) == (6, by_device), sequences
        assert did.misses > 0
    model.moe_offload.close()


def test_the_decisions_are_those_of_the_host():
    seen = []
    for settings in (DEVICE, replace(SETTINGS, decide="host", policy="decayed_lfu", overlap=False)):
        torch._dynamo.reset()
        model = offload(build(QWEN, num_hidden_layers=2), 0.75, config=settings, device_map="cpu")
        said = say(model, 3)
        stats, profile = model.moe_offload.stats(), model.moe_offload.profile()
        seen.append((said.tolist(), stats.hits, stats.misses, stats.bytes_read, stats.tokens, profile.counts))
        model.moe_offload.close()
    assert seen[0] == seen[1]


def test_a_size_is_compiled_once_and_the_callers_tensors_are_not_marked():
    model = offload(build(QWEN, num_hidden_layers=1), 0.75, config=DEVICE, device_map="cpu")
    say(model, 2)
    graphs = model.moe_offload.stats().graphs
    say(model, 2, n=12)
    assert model.moe_offload.stats().graphs == graphs
    step = torch.tensor([[5], [6]])
    with torch.no_grad():
        model(step)
        model(input_ids=step)
    assert not getattr(step, "_dynamo_static_indices", None)
    model.moe_offload.close()


def test_a_step_that_does_not_fit_the_slots_of_some_layer_is_the_hosts_in_all(monkeypatch):
    """In 5 and 4 slots: five pairs, which are a constant of the graph, would go to the device in the first layer."""
    model = build(QWEN, num_hidden_layers=2, num_experts_per_tok=1)
    monkeypatch.setattr(arrange, "plan_slots", lambda *args: replace(plan_slots(*args), slots=(5, 4)))
    model = offload(model, 0.7, config=replace(DEVICE, dynamic=False), device_map="cpu")
    assert [layer.cache.slots for layer in model.moe_offload._runtime.layers] == [5, 4]
    plain = resident(layers=2, num_experts_per_tok=1)
    for tokens, by_device in ((4, 2), (5, 0), (4, 2)):
        before = model.moe_offload.stats()
        with torch.no_grad():
            assert torch.equal(model(IDS[:, :tokens]).logits, plain(IDS[:, :tokens]).logits)
        assert (model.moe_offload.stats() - before).by_device == by_device
    model.moe_offload.close()


def test_so_many_sizes_get_graphs_and_the_host_serves_the_others(monkeypatch):
    monkeypatch.setattr(steps, "SIZES", 1)
    plain = resident(layers=1)
    model = offload(build(QWEN, num_hidden_layers=1), 0.75, config=DEVICE, device_map="cpu")
    for sequences, by_device in ((2, 5), (3, 0), (2, 5)):
        before = model.moe_offload.stats()
        assert torch.equal(say(model, sequences), say(plain, sequences))
        assert (model.moe_offload.stats() - before).by_device == by_device
    model.moe_offload.close()


def test_which_forwards_have_a_function_of_their_own(caplog):
    made = []
    found = Steps(lambda: made.append(lambda *args, **kwargs: len(made)) or made[-1], most=lambda: 100)
    assert found.find(1, 1) is found.find(2, 7) is found.find(0, 0) is found.find(101, 1) is None and not made
    functions = [found.find(n, 1) for n in range(2, 2 + SIZES)]
    assert len(set(functions)) == len(made) == SIZES
    assert not caplog.records
    assert found.find(50, 1) is found.find(51, 1) is None
    (record,) = caplog.records
    assert "50 sequences: 2, 3, 4, 5, 6, 7, 8, 9 already have" in record.getMessage()
    assert [found.find(n, 1) for n in range(2, 2 + SIZES)] == functions
    assert Steps(None, most=lambda: 0).find(2, 1) is None


def test_the_cache_of_a_forward_has_either_name():
    for kwargs in ({"past_key_values": 1}, {"cache": 1}, {"past_key_values": None, "cache": 1}):
        assert find_cache(kwargs) == 1
    assert find_cache({}) is None
