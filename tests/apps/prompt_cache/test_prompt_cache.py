"""Prompts that are not read twice: as plain transformers that is handed the same KV cache, and within a bound."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria

from moe_offload.apps.families.tiny import build
from moe_offload.apps.prompt_cache.cache import PromptCache
from moe_offload.apps.prompt_cache.kv_slices import nbytes
from tests.fakes.offloaded import offload, resident

ASK = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
FAMILIES = {"qwen3_moe": {}, "mixtral": {"sliding_window": 24}, "gpt_oss": {"sliding_window": 200}, "qwen3_next": {}}


@pytest.fixture(scope="module")
def pair():
    plain, model = resident(layers=2), offload(build("qwen3_moe", num_hidden_layers=2))
    yield plain, model
    model.moe_offload.close()


@pytest.fixture
def read(monkeypatch):
    """How many tokens each forward of a prompt had."""
    found = []
    check = "moe_offload.forward.call.Call._check_length"
    monkeypatch.setattr(check, lambda call, sequences, tokens: found.append(tokens))
    return found


def draw(tokens, seed=0):
    return torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(seed))


def then(told, more, seed=9):
    """The next prompt: all that was told, and `more` tokens."""
    return torch.cat([told, draw(more, seed)], dim=1)


def logits(generate, ids, **options):
    out = generate(ids, **ASK, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_turns(family, read):
    """To the bit what plain transformers gives that is handed its own KV cache; and the tokens of a fresh run. A
    window that has moved, and states that sum up what was read, are gone on from as well."""
    plain, model = resident(family, layers=3, **FAMILIES[family]), offload(build(family, **FAMILIES[family]))
    with model.moe_offload:
        prompts, cache = PromptCache(model, tokens=400), DynamicCache(config=plain.config)
        ids, known = draw(30), 0
        for turn in range(3):
            tokens, ours = logits(prompts.generate, ids)
            wanted, theirs = logits(plain.generate, ids, past_key_values=cache)
            assert torch.equal(tokens, wanted) and torch.equal(ours, theirs)
            assert torch.equal(tokens, plain.generate(ids, **ASK)), "of a fresh run"
            assert prompts.known_tokens == known and read == [ids.shape[1] - known]
            read.clear()
            known, ids = tokens.shape[1] - 1, then(tokens, 7, turn)


def test_what_begins_alike_is_shared(pair, read):
    """Two conversations after one system prompt; each goes on, though the other did."""
    plain, model = pair
    prompts, told = PromptCache(model, tokens=400), draw(40)
    first, second = then(told, 10, 1), then(told, 12, 2)
    one, two = (prompts.generate(ids, **ASK) for ids in (first, second))
    assert read == [50, 12] and prompts.known_tokens == 40
    for tokens in (one, two):
        ids = then(tokens, 5)
        assert torch.equal(prompts.generate(ids, **ASK), plain.generate(ids, **ASK))
        assert prompts.known_tokens == tokens.shape[1] - 1
    prompts.generate(first, **ASK)
    assert prompts.known_tokens == 49, "the last token of a prompt is computed: its logits are wanted"


def test_what_has_little_in_common_is_read_anew(pair):
    prompts, ids = PromptCache(pair[1], tokens=400), draw(40)
    prompts.generate(ids, **ASK)
    prompts.generate(torch.cat([ids[:, :15], draw(20, 5)], dim=1), **ASK)
    assert prompts.known_tokens == 0


def test_all_of_it_is_within_the_bound(pair):
    """Those that wait, with room for the one that runs; the least recently used goes first."""
    plain, model = pair
    prompts, one, two = PromptCache(model, tokens=130), draw(40, 1), draw(40, 2)
    room = []
    lend = prompts._lend
    prompts._lend = lambda ids, more: (lend(ids, more), room.append(prompts.most_bytes - prompts.nbytes))[0]
    answers = [prompts.generate(ids, **ASK) for ids in (one, two)]
    assert prompts.nbytes == 2 * 45 * prompts._token_bytes
    prompts.generate(then(answers[0], 4), **ASK)  # the first is the last that was used
    prompts.generate(draw(40, 3), **ASK)
    assert all(free >= 46 * prompts._token_bytes for free in room) and prompts.nbytes <= prompts.most_bytes
    prompts.generate(then(answers[0], 4), **ASK)
    assert prompts.known_tokens == 49
    prompts.generate(two, **ASK)
    assert prompts.known_tokens == 0
    assert torch.equal(prompts.generate(two, **ASK), plain.generate(two, **ASK))


class Interrupted(StoppingCriteria):
    """Ctrl-C after so many new tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **_):
        self.tokens -= 1
        if not self.tokens:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)


def test_an_answer_that_was_interrupted_is_kept_as_far_as_it_came(pair, read, monkeypatch):
    plain, model = pair
    prompts, ids = PromptCache(model, tokens=400), draw(30)
    wanted = plain.generate(ids, **ASK)
    with pytest.raises(KeyboardInterrupt):
        prompts.generate(ids, **ASK, stopping_criteria=[Interrupted(3)])
    calls = []

    def in_the_midst_of_a_forward(*_):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(in_the_midst_of_a_forward)
    with pytest.raises(KeyboardInterrupt):
        prompts.generate(then(wanted, 5), **ASK)
    hook.remove()
    assert prompts.known_tokens == 32
    for tokens in (then(wanted, 5), then(wanted, 9, 3)):
        assert torch.equal(prompts.generate(tokens, **ASK), plain.generate(tokens, **ASK))


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_that_are_lent_are_those_of_a_fresh_prompt(family):
    """But for roundings, layer by layer, whatever was cut, gone on from, or ended in the midst of a forward."""
    plain, model = resident(family, layers=3, **FAMILIES[family]), offload(build(family, **FAMILIES[family]))
    chance, told, ended, known = random.Random(0), [], [0], 0
    prompts = PromptCache(model, tokens=300)
    lend, lent = prompts._lend, {}

    def lend_and_look(*asked):
        cache, lent["known"] = lend(*asked)
        lent["layers"] = [
            {n: v.clone() for n, v in vars(x).items() if isinstance(v, torch.Tensor)} for x in cache.layers
        ]
        return cache, lent["known"]

    def end_in_the_midst(*_):
        ended[0] -= 1
        if not ended[0]:
            raise KeyboardInterrupt

    prompts._lend = lend_and_look
    with model.moe_offload:
        for layer in model.model.layers:
            layer.register_forward_pre_hook(end_in_the_midst)
        for _ in range(24):
            text = chance.choice(told) if told and chance.random() < 0.8 else draw(40, chance.randrange(99))
            ids = then(text[:, : chance.randint(20, 60)], chance.randint(1, 9), chance.randrange(99))
            ended[0] = chance.choice([0, 0, chance.randint(1, 18)])
            try:
                told.append(prompts.generate(ids, **ASK))
            except KeyboardInterrupt:
                told.append(ids)
            else:
                assert torch.equal(told[-1], plain.generate(ids, **ASK))
            known += lent["known"] > 0
            if lent["known"]:
                cache = DynamicCache(config=plain.config)
                plain(ids[:, : lent["known"]], past_key_values=cache)
                for layer, kept in zip(cache.layers, lent["layers"], strict=True):
                    for name, value in kept.items():
                        torch.testing.assert_close(value, getattr(layer, name), atol=1e-4, rtol=1e-4)
    assert known >= (8 if family in ("qwen3_moe", "gpt_oss") else 1)


def test_a_window_that_has_moved_is_not_cut():
    """Within the window a beginning can be had, afterwards it is gone."""
    family, options = "mixtral", FAMILIES["mixtral"]
    plain, model = resident(family, layers=2, **options), offload(build(family, num_hidden_layers=2, **options))
    few = {**ASK, "max_new_tokens": 2, "min_new_tokens": 2}
    with model.moe_offload:
        told = draw(18)
        for first, known in ((then(told, 2), 18), (then(told, 40), 0)):
            prompts, second = PromptCache(model, tokens=400), then(told, 30, 4)
            prompts.generate(first, **few)
            assert torch.equal(prompts.generate(second, **ASK), plain.generate(second, **ASK))
            assert prompts.known_tokens == known


def test_requests_that_go_otherwise_are_left_alone(pair):
    plain, model = pair
    prompts, ids = PromptCache(model, tokens=400), draw(30)
    for options in ({"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(prompts.generate(ids, **ASK, **options), plain.generate(ids, **ASK, **options))
    assert not prompts._entries


@pytest.mark.parametrize("what", ["two sequences", "padding", "positions", "embeddings", "a cache"])
def test_what_is_more_than_the_tokens_of_one_sequence_is_not_kept(pair, what):
    """Neither does it go on from what was kept, nor is it kept for a prompt of the same tokens."""
    plain, model = pair
    prompts, ids = PromptCache(model, tokens=400), draw(30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    more = {
        "two sequences": lambda: {},
        "padding": lambda: {"attention_mask": mask},
        "positions": lambda: {"position_ids": 2 * torch.arange(30)[None]},
        "embeddings": lambda: {"inputs_embeds": plain.get_input_embeddings()(draw(30, 1))},
        "a cache": lambda: {"past_key_values": DynamicCache(config=plain.config)},
    }[what]
    both = torch.cat([ids, draw(30, 2)]) if what == "two sequences" else ids
    for _ in range(2):
        assert torch.equal(prompts.generate(both, **ASK, **more()), plain.generate(both, **ASK, **more()))
        assert torch.equal(prompts.generate(ids, **ASK), plain.generate(ids, **ASK))


@pytest.mark.parametrize(
    ("family", "why"), [("jamba", "jamba"), ("axk2", "DynamicIndexedLayer"), ("minimax", "of its own kind")]
)
def test_families_whose_caches_do_not_go_on(family, why):
    assert why in PromptCache(build(family), tokens=400).why_off


def test_without_room_in_the_budget_nothing_is_kept(pair):
    prompts = PromptCache(pair[1], tokens=0)
    assert "no room" in prompts.why_off
    prompts.generate(draw(20), **ASK)
    assert not prompts._entries


def test_what_a_view_keeps_is_counted():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 100, 4), torch.zeros(1, 2, 100, 4), 0)
    cache.crop(-90)
    assert nbytes(cache) == 2 * 2 * 100 * 4 * 4
