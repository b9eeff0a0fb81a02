"""The KV cache of `generate` where decode steps are CUDA graphs: static, in the same memory, and nobody else's."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from moe_offload.forward.batch_sizes import find_cache
from moe_offload.forward.graphs.kv_pool import KVPool, bucket_tokens
from moe_offload.patch.generation.static_cache import keep_static_caches
from tests.fakes.offloaded import IDS, SETTINGS, offload, resident

PLANNED = 48


@pytest.fixture(scope="module")
def plain():
    return resident()


@pytest.fixture
def model():
    torch._dynamo.reset()
    model = offload(resident(), 0.5, config=replace(SETTINGS, decide="device"), device_map="cpu")
    keep_static_caches(model, KVPool(2 * PLANNED), PLANNED)
    yield model
    model.moe_offload.close()


def generate(model, ids=IDS, n=4, **options):
    return model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0, **options)


def addresses(cache):
    names = ("keys", "values", "cumulative_length")
    return [getattr(layer, name).data_ptr() for layer in cache.layers for name in names if name in vars(layer)]


@pytest.fixture
def used(model):
    """The addresses of the cache that each decode step was given."""
    found, run = [], model._compiled_call_impl.run

    def watched(sequences, tokens, args, kwargs):
        if tokens == 1:
            cache = find_cache(kwargs)
            found.append((type(cache), tuple(addresses(cache))))
        return run(sequences, tokens, args, kwargs)

    model._compiled_call_impl.run = watched
    return found


def test_requests_of_any_length_decode_in_the_same_memory(model, plain, used):
    draw = random.Random(0)
    for i in range(15):
        if i == 3:  # what is compiled holds the caches that it was traced with, for a while
            gc.collect()
            used.clear()
        ids = torch.tensor([[draw.randrange(3, 90) for _ in range(draw.randrange(2, 30))]])
        assert torch.equal(generate(model, ids), generate(plain, ids)), i
    assert {kind for kind, _ in used} == {StaticCache}
    assert len({places for _, places in used}) == 1, "planned for one length: one cache, at one place"


@pytest.mark.parametrize("requests", [20, pytest.param(200, marks=pytest.mark.long)])
def test_two_hundred_requests_decode_in_four_memories(model, used, requests):
    """A step is recorded for each memory it decodes in: prompts of all lengths, and no more recordings after the first
    of each length of cache. What is compiled holds the caches that it was traced with, for a while: hence the two."""
    keep_static_caches(model, KVPool(2 * 2048), 2048)
    draw = random.Random(0)
    warm_up = [3, 300, 600, 1100] * 2
    lengths = warm_up + [min(1900, 2 + int(draw.expovariate(1 / 60))) for _ in range(requests - len(warm_up))]
    gc.disable()  # Python's own collections come at any time: here at none
    try:
        for i, length in enumerate(lengths):
            if i == len(warm_up) // 2:
                gc.collect()
                used.clear()
            if i == len(warm_up):
                warm = set(used)
            generate(model, (torch.arange(length) * 7 % 90 + 3).view(1, -1), n=2)
    finally:
        gc.enable()
    assert len(used) == requests - 4 and len(warm) == 4
    assert set(used) == warm, "nothing is recorded again"


def test_a_cache_that_is_not_kept_is_told_of_once(model, caplog):
    with caplog.at_level("INFO", "moe_offload"):
        generate(model)
        assert "not kept" not in caplog.text
        for _ in range(2):
            generate(model, torch.arange(3, 2 * PLANNED + 3).view(1, -1))
    said = [message for message in caplog.messages if "not kept" in message]
    assert len(said) == 1 and f"more than the {2 * PLANNED}" in said[0]


def test_a_cache_that_somebody_holds_is_not_lent_again(model, plain):
    kept = generate(model, return_dict_in_generate=True).past_key_values
    before = kept.layers[0].keys.clone()
    again = generate(model, IDS + 1, return_dict_in_generate=True).past_key_values
    assert torch.equal(kept.layers[0].keys, before) and set(addresses(kept)).isdisjoint(addresses(again))
    keys = again.layers[0].keys
    held = keys.clone()
    del again
    assert torch.equal(generate(model), generate(plain))
    assert torch.equal(keys, held), "held by its tensor alone"


def test_what_is_asked_for_is_given(model, plain, used):
    generate(model, cache_implementation="dynamic")
    generate(model, past_key_values=DynamicCache(config=model.config))
    assert {kind for kind, _ in used} == {DynamicCache}
    used.clear()
    assert torch.equal(generate(model, num_beams=2), generate(plain, num_beams=2))
    assert {kind for kind, _ in used} == {DynamicCache}, "beams go back in a cache"
    for options in ({"cache_implementation": "static"}, {}) * 2:  # what is compiled holds a cache for a while
        generate(model, n=2, **options)
    used.clear()
    gc.collect()
    generate(model, cache_implementation="static")
    generate(model)
    assert {kind for kind, _ in used} == {StaticCache} and len({places for _, places in used}) == 1


def test_generation_settings_of_the_model_stay_as_they_are(model):
    generate(model)
    assert model.generation_config.cache_implementation is None


def test_inference_mode_has_a_cache_of_its_own(model, plain):
    with torch.inference_mode():
        generate(model)
    assert torch.equal(generate(model), generate(plain))


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 256), (257, 512), (1025, 2000), (2000, 2000), (2001, 2048), (5000, 5120)]
)
def test_lengths_are_few_and_within_the_plan_where_they_can_be(tokens, length):
    assert bucket_tokens(tokens, 2000) == length >= tokens


@pytest.mark.parametrize("call", [lambda test: test(), torch._dynamo.run(lambda test: test())], ids=["", "dynamo"])
def test_spare_caches_are_few_and_given_up_on_demand(call):
    call(check_spare_caches)


def check_spare_caches():
    class Cache(SimpleNamespace):
        __hash__ = object.__hash__

        def reset(self):
            pass

    def make():
        return Cache(layers=[SimpleNamespace(is_initialized=True, keys=torch.zeros(1))])

    forgotten = []
    pool = KVPool(100, lambda: forgotten.append(1))
    for tokens in (10, 20, 30, 40, 50):
        pool.lend(1, tokens, make)
    assert [key.tokens for key, _ in pool._spare] == [50, 40], "no more tokens than the plan has room for"
    layers = pool._spare[0][1]
    held = pool.lend(1, 50, make)
    assert held.layers is layers and len(pool._spare) == 1
    other = pool.lend(2, 11, make)
    assert not pool._spare, "what is in use counts, too"
    del held
    assert [key.tokens for key, _ in pool._spare] == [50]
    del other
    assert [key.tokens for key, _ in pool._spare] == [11, 50]
    pool.lend(2, 51, make)
    assert not pool._spare, "what is larger than that is not kept, nor what was used before it"
    pool.lend(1, 50, make)
    pool.drop()
    assert not pool._spare and not forgotten
    for tokens in range(1, 3):
        pool.lend(1, tokens, make)
    assert len(forgotten) == 1, "recordings of caches that are gone"


def test_a_cache_in_a_cycle_is_found_before_another_is_made():
    class Cache(SimpleNamespace):
        __hash__ = object.__hash__

        def reset(self):
            pass

    def make():
        return Cache(layers=[SimpleNamespace(is_initialized=True, keys=torch.zeros(1))])

    pool = KVPool(100)
    first = pool.lend(1, 10, make)
    first.itself, layers = first, first.layers
    gc.disable()
    try:
        del first
        assert pool.lend(1, 10, make).layers is layers
    finally:
        gc.enable()


def test_caches_that_are_in_use_are_not_looked_for_at_each_request(monkeypatch):
    """A user holds one, and there is no room to keep that of a request: garbage is collected once, not each time."""

    class Cache(SimpleNamespace):
        __hash__ = object.__hash__

    pool, collected = KVPool(15), []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    held = pool.lend(1, 10, lambda: Cache(layers=[]))
    for _ in range(5):
        pool.lend(1, 10, lambda: Cache(layers=[SimpleNamespace(is_initialized=True, keys=torch.zeros(1))]))
    assert held and collected == [1]
    other = pool.lend(1, 10, lambda: Cache(layers=[]))
    pool.lend(1, 10, lambda: Cache(layers=[]))
    assert other and collected == [1, 1], "of the new one it is not known"
