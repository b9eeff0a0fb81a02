"""What a CUDA graph asks of a decode step, looked at without one: what moves, what is mutated, which sizes change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from moe_offload.forward.graphs import compiling
from moe_offload.forward.graphs.cuda_graphs import StaticCaches, can_be_recorded, copy_outputs
from moe_offload.runtime import device_cache
from passes import ops
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, resident

FAMILIES = [QWEN, *(pytest.param(family, marks=pytest.mark.long) for family in ("gpt_oss", "deepseek_v3"))]
#: As on a GPU: sizes are constants until they are seen to change.
DEVICE = replace(SETTINGS, decide="device", poison=False, dynamic=None)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def steps(monkeypatch):
    """Of each decode step that is compiled: what AOTAutograd, and so Inductor, knows of its inputs; is it recorded?"""
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

    found = []

    def inner(gm, inputs):
        def looked_at(forward, _):
            found.append((torch._guards.TracingContext.get().fw_metadata, can_be_recorded(gm.graph)))
            return make_boxed_func(forward.forward)

        if any(node.target is ops.place for node in gm.graph.nodes):
            aot_module_simplified(gm, inputs, fw_compiler=looked_at, keep_inference_input_mutations=True)
        return gm.forward

    monkeypatch.setattr(compiling, "run_graph", inner)
    return found


def generate(model, n, **options):
    return model.generate(IDS, max_new_tokens=n, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_mutates_nothing_but_what_stays_where_it_is(family, steps):
    plain = resident(family, layers=2)
    model = offload(resident(family, layers=2), 0.5, config=DEVICE, device_map="cpu")
    for tokens in (4, 3, 9):  # the last needs a longer cache
        got = generate(model, tokens, cache_implementation="static")
        assert torch.equal(got, generate(plain, tokens))
    assert len(steps) == 2, "a step for the first length, and one for all others"
    for known, constant in steps:
        mutated = {i for i, info in enumerate(known.input_info) if info.mutates_data}
        # A bank each, and keys and values. A sliding window that is full no longer counts its length in a tensor.
        assert len(mutated) >= 3 * len(model.moe_offload.moe_layers)
        assert mutated <= set(known.static_input_indices)
        assert constant
    model.moe_offload.close()


def test_a_step_with_a_cache_that_grows_is_not_recorded(steps):
    model = offload(resident(layers=2), 0.5, config=DEVICE, device_map="cpu")
    generate(model, 6)
    assert [constant for _, constant in steps] == [False], "compiled once, and not with the first length as a constant"
    model.moe_offload.close()


@pytest.mark.parametrize(
    ("used", "says"),
    [(lambda n, x: n + 1, True), (lambda n, x: x.expand(n), False), (lambda n, x: x * n, False)],
    ids=["counted", "a size", "a factor"],
)
def test_a_number_that_changes_may_be_counted_and_no_more(used, says):
    seen = []

    def look(gm, inputs):
        seen.append(can_be_recorded(gm.graph))
        return gm.forward

    run = torch.compile(lambda n, x: (used(n, x), x + 1), backend=look, dynamic=True)
    kept = torch.ones(1)
    torch._dynamo.mark_static_address(kept, guard=False)  # as a static KV cache is
    run(5, kept)
    assert seen == [says]


def test_a_cache_is_marked_once_all_of_it_is_there():
    model = resident(layers=2)
    cache, marks = StaticCache(config=model.config, max_cache_len=16), StaticCaches()
    marks.mark(cache)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(IDS, past_key_values=cache)
    tensors = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values", "cumulative_length")]
    for tensor in tensors:
        vars(tensor).clear()  # as a traced prefill leaves them
    marks.mark(cache)
    assert all(tensor._dynamo_static_input_type == "unguarded" for tensor in tensors)
    growing = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=growing)
    marks.mark(growing)
    marks.mark(None)
    assert not any(hasattr(layer.keys, "_dynamo_static_input_type") for layer in growing.layers)


def test_nothing_is_made_within_a_step_that_outlives_it(monkeypatch):
    """A graph's memory pool may hold nothing else: Inductor looks, and raises."""
    place, within = device_cache.DeviceCache.place, []

    def watched(self, ids_P):
        within.append(1)
        try:
            return place(self, ids_P)
        finally:
            within.pop()

    def outside(f):
        def made(*arguments):
            assert not within, "made within a step"
            return f(*arguments)

        return made

    monkeypatch.setattr(device_cache.DeviceCache, "place", watched)
    monkeypatch.setattr(device_cache.Loads, "empty", staticmethod(outside(device_cache.Loads.empty)))
    monkeypatch.setattr(device_cache, "make_pace", outside(device_cache.make_pace))
    model = offload(resident(layers=2), 0.5, config=DEVICE, device_map="cpu")
    generate(model, 4)
    cache = model.moe_offload._runtime.device_caches.caches[0]
    with pytest.raises(AssertionError, match="3 pairs was not prepared for"):
        cache.place(torch.zeros(3, dtype=torch.int64))
    model.moe_offload.close()


def test_outputs_are_in_memory_of_their_own():
    x = torch.ones(3)
    kept, other, number = copy_outputs((x, None, 3))
    x.zero_()
    assert kept.tolist() == [1, 1, 1] and other is None and number == 3
