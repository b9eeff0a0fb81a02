"""What a failed forward did to transformers' caches is taken back to the bit, or not at all."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, StaticCache

from moe_offload.apps.families.tiny import build
from moe_offload.forward.out_of_memory.kv_undo import _undo_each, remember_caches

WINDOW, LONGEST = 8, 16
LAYERS = 3


MAKERS = {
    "dynamic": lambda: cache_utils.Cache(layer_class_to_replicate=cache_utils.DynamicLayer),
    "dynamic, sliding": lambda: cache_utils.Cache(
        layers=[cache_utils.DynamicLayer(), DynamicSlidingWindowLayer(WINDOW), cache_utils.DynamicLayer()]
    ),
    "static": lambda: cache_utils.Cache(layers=[cache_utils.StaticLayer(LONGEST) for _ in range(LAYERS)]),
    "static, sliding": lambda: cache_utils.Cache(
        layers=[
            cache_utils.StaticLayer(LONGEST),
            cache_utils.StaticSlidingWindowLayer(LONGEST, WINDOW),
            cache_utils.StaticLayer(LONGEST),
        ]
    ),
    "with a layer that holds nothing": lambda: cache_utils.Cache(
        layers=[cache_utils.DynamicLayer(), cache_utils.DummyLayer(), cache_utils.DynamicLayer()]
    ),
}
kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def append(cache, tokens, layers=LAYERS, seed=0):
    """As the attention of the first `layers` does; returns what each of them sees."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for i in range(layers):
        kv = torch.randn(2, 1, 2, tokens, 4, generator=generator)
        if i >= len(cache.layers) or not isinstance(cache.layers[i], cache_utils.DummyLayer):
            seen.append([part.clone() for part in cache.update(kv[0], kv[1], i)])
    return seen


def held(cache):
    return [
        {name: x.clone() if isinstance(x, torch.Tensor) else copy.copy(x) for name, x in vars(layer).items()}
        for layer in cache.layers
    ]


def same(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, x in mine.items():
            assert torch.equal(x, theirs[name]) if isinstance(x, torch.Tensor) else x == theirs[name], name


@kinds
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("failed_at", range(LAYERS + 1))
def test_the_same_forward_once_more(make, before, tokens, failed_at):
    plain, cache = make(), make()
    for one in (plain, cache):
        if before:
            append(one, before, seed=1)
    undo = remember_caches([(torch.ones(1, tokens), {"past_key_values": cache, "use_cache": True})], tokens)
    append(cache, tokens, failed_at, seed=2)
    assert undo()
    for n, seed in ((tokens, 2), (1, 3)):
        for mine, theirs in zip(append(cache, n, seed=seed), append(plain, n, seed=seed), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    same(held(cache), held(plain))


def test_keys_that_were_appended_without_their_values():
    cache = MAKERS["dynamic"]()
    append(cache, 3)
    before, undo = held(cache), remember_caches([cache], 2)
    layer = cache.layers[1]
    layer.keys = torch.cat([layer.keys, torch.zeros(1, 2, 2, 4)], dim=-2)
    assert undo()
    same(held(cache), before)


def test_a_dynamic_window_that_has_moved_is_not_put_back_and_one_that_has_not_is():
    cache = MAKERS["dynamic, sliding"]()
    append(cache, WINDOW + 2)
    before, undo = held(cache), remember_caches([cache], 1)
    append(cache, 1, layers=1)  # not as far as the window
    assert undo()
    same(held(cache), before)
    undo = remember_caches([cache], 1)
    append(cache, 1)
    assert not undo()


def test_a_static_window_that_may_move_is_known_to_be_lost():
    cache = MAKERS["static, sliding"]()
    append(cache, WINDOW - 1)
    assert remember_caches([cache], 1) is not None
    assert remember_caches([cache], 2) is None


def test_a_length_that_nobody_can_explain_is_not_put_back():
    for kind in ("dynamic", "static"):
        cache = MAKERS[kind]()
        append(cache, 3)
        undo = remember_caches([cache], 2)
        append(cache, 1)
        assert not undo()


def test_a_static_cache_that_was_reset_begins_anew():
    cache, plain = MAKERS["static, sliding"](), MAKERS["static, sliding"]()
    append(cache, 5, seed=1)
    cache.reset()
    undo = remember_caches([cache], 4)
    append(cache, 4, layers=2, seed=2)
    assert undo()
    for mine, theirs in zip(append(cache, 4, seed=2), append(plain, 4, seed=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_recurrent_states_are_put_back_only_where_there_were_none():
    config = build("qwen3_next").config
    cache, fresh = DynamicCache(config=config), DynamicCache(config=config)
    undo = remember_caches([cache], 3)
    linear = next(i for i, layer in enumerate(cache.layers) if isinstance(layer, cache_utils.LinearAttentionLayer))
    cache.update_conv_state(torch.randn(1, 4, 3), linear)
    cache.update_recurrent_state(torch.randn(1, 2, 4, 4), linear)
    assert undo()
    same(held(cache), held(fresh))
    cache.update_recurrent_state(torch.randn(1, 2, 4, 4), linear)
    assert remember_caches([cache], 1) is None


class OfAModel(DynamicCache):
    pass


class Unknown:
    pass


@pytest.mark.parametrize("argument", [Unknown(), OfAModel(), {"a": [Unknown()]}, iter([])])
def test_what_may_hold_state_of_its_own_is_not_put_back(argument):
    assert remember_caches([argument], 1) is None


def test_a_cache_that_moves_between_devices_is_not_put_back():
    cache = MAKERS["dynamic"]()
    cache.offloading = True
    assert remember_caches([cache], 1) is None


def test_every_part_is_put_back_though_one_cannot_be():
    done = []
    assert not _undo_each([lambda: False, lambda: bool(done.append(1)) or True])
    assert done == [1]


def test_plain_arguments_need_no_undoing():
    undo = remember_caches(
        [torch.ones(1), None, {"mask": {"full_attention": torch.ones(1)}}, "x", 1.0, torch.float32], 1
    )
    assert undo is not None and undo()


def test_transformers_own_caches_are_made_of_such_layers():
    config = build("gpt_oss").config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=LONGEST)):
        assert remember_caches([cache], 4) is not None
