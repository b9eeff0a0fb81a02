"""`generate` reads what the reserve has no room for in pieces, by itself, as plain transformers does when told to."""

from __future__ import annotations

import pytest
import torch

from moe_offload.apps.families.table import FAMILIES
from moe_offload.apps.families.tiny import available_families, build
from moe_offload.patch.generation.kv_kinds import GO_ON, why_not_continued
from moe_offload.plan.prefill import PrefillRoom
from tests.fakes.offloaded import offload, resident

TOKENS, SIZE, PIECES = 70, 14, 5
ASK = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
GENERATING = [
    name for name in available_families() if FAMILIES[name].kind == "lm" and FAMILIES[name].model.endswith("CausalLM")
]


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """For 16 tokens at a time, so that tiny models and short prompts will do."""
    monkeypatch.setattr(PrefillRoom, "most_tokens", lambda room, keys, sequences=1: 16 // sequences)


def draw(model, sequences=1, tokens=TOKENS):
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def read(model, ids, **options):
    out = model.generate(ids, **{"return_dict_in_generate": True, "output_logits": True, **ASK, **options})
    return out.sequences, torch.stack(out.logits)


def prompts(model):
    """The sizes of the forwards of more than one token that `model`, offloaded, runs from now on."""
    found, call = [], model._compiled_call_impl
    run = call.run

    def watched(sequences, tokens, args, kwargs):
        if tokens > 1:
            found.append((sequences, tokens))
        return run(sequences, tokens, args, kwargs)

    call.run = watched
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "llama4"])
def test_a_long_prompt(family):
    """To the bit what plain transformers gives in the same pieces; and the tokens that it gives in one."""
    plain, model = resident(family, layers=3), offload(build(family))
    ids = draw(plain)
    with model.moe_offload as handle:
        assert handle.prefill_chunk_size(TOKENS) == SIZE
        found = prompts(model)
        tokens, logits = read(model, ids)
    assert found == [(1, SIZE)] * PIECES
    wanted, wanted_logits = read(plain, ids, prefill_chunk_size=SIZE)
    assert torch.equal(tokens, wanted) and torch.equal(logits, wanted_logits)
    whole, whole_logits = read(plain, ids)
    assert torch.equal(tokens, whole)
    assert 0 < (logits - whole_logits).abs().max() < 1e-5, "the pieces differ by roundings, and by no more"


@pytest.fixture(scope="module")
def plain():
    return resident(layers=2)


@pytest.fixture
def model():
    model = offload(build("qwen3_moe", num_hidden_layers=2))
    yield model
    model.moe_offload.close()


def test_left_padding_beams_and_a_static_cache(model, plain):
    """The first sequence is padded by more than a whole piece."""
    ids = draw(plain, sequences=2)
    mask = torch.ones_like(ids)
    mask[0, :33] = 0
    for options in ({}, {"num_beams": 2, "output_logits": False}, {"cache_implementation": "static"}):
        found = prompts(model)
        asked = {"attention_mask": mask, **ASK, **options}
        tokens = model.generate(ids, **asked)
        sequences = 2 * options.get("num_beams", 1)
        size = model.moe_offload.prefill_chunk_size(TOKENS, sequences=sequences)
        assert found[0] == (sequences, size) and sum(n for _, n in found) >= TOKENS - 1
        assert torch.equal(tokens, plain.generate(ids, prefill_chunk_size=size, **asked))
        assert torch.equal(tokens, plain.generate(ids, **asked))


def test_after_a_cache_that_holds_a_part_of_it(model, plain):
    """The ids of all of it, or those that are new."""
    ids = draw(plain)
    for new in (ids, ids[:, 20:]):
        results = []
        for one, options in ((model, {}), (plain, {"prefill_chunk_size": 13})):
            cache = one(ids[:, :20], use_cache=True).past_key_values
            mask = torch.ones_like(ids)
            results.append(read(one, new, past_key_values=cache, attention_mask=mask, **options)[1])
        assert model.moe_offload.prefill_chunk_size(50, past=20) == 13
        assert torch.equal(*results)


def test_each_piece_loads_the_experts_of_a_layer_once(model):
    with_room = model.moe_offload.stats()
    read(model, draw(model))
    used = model.moe_offload.stats() - with_room
    for layer in used.layers:
        assert layer.hits + layer.misses + layer.late + layer.streamed <= PIECES * layer.experts + 6 * 2


def test_a_size_that_was_asked_for_is_kept(model):
    found = prompts(model)
    read(model, draw(model), prefill_chunk_size=TOKENS)
    model.generation_config.prefill_chunk_size = 40
    read(model, draw(model))
    assert found == [(1, TOKENS), (1, 40), (1, 30)]


@pytest.mark.parametrize(
    ("options", "why"), [({"use_cache": False}, "use_cache"), ({"output_hidden_states": True}, "output_hidden_states")]
)
def test_what_does_not_go_in_pieces_is_said_once(model, plain, caplog, options, why):
    found, ids = prompts(model), draw(plain)
    with caplog.at_level("WARNING", "moe_offload"):
        tokens, logits = read(model, ids, **options)
        read(model, ids, **options)
    wanted = read(plain, ids, **options)
    assert torch.equal(tokens, wanted[0]) and torch.equal(logits, wanted[1])
    assert found[0] == (1, TOKENS)
    said = [record.getMessage() for record in caplog.records if "in one piece" in record.getMessage()]
    assert len(said) == 1 and why in said[0] and "70 tokens" in said[0]


def test_embeddings_are_read_at_once(model, plain):
    embeds = plain.get_input_embeddings()(draw(plain))
    found = prompts(model)
    asked = {"inputs_embeds": embeds, **ASK}
    assert torch.equal(model.generate(**asked), plain.generate(**asked))
    assert found == [(1, TOKENS)]


@pytest.mark.parametrize("family", ["jamba", "axk2", "minimax"])
def test_a_family_that_reads_its_prompt_whole(family, caplog):
    """State that is not handed on, keys picked by an index, a cache of its own."""
    model, plain = (build(family) for _ in range(2))
    with offload(model).moe_offload, caplog.at_level("WARNING", "moe_offload"):
        found = prompts(model)
        tokens = model.generate(draw(plain), **ASK)
    assert found == [(1, TOKENS)] and "in one piece" in caplog.text
    assert torch.equal(tokens, plain.generate(draw(plain), **ASK))


@pytest.mark.long
@pytest.mark.parametrize("family", GENERATING)
def test_every_family_that_goes_in_pieces_may(family):
    """Plain transformers alone: what is let through differs by roundings, with sequences that are padded, too."""
    plain = build(family)
    ids = draw(plain, sequences=2, tokens=96)
    mask = torch.ones_like(ids)
    mask[0, :39] = 0
    whole = plain.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **ASK)
    cache = getattr(whole, "past_key_values", None)
    if why_not_continued(plain, cache):
        pytest.skip(why_not_continued(plain, cache))
    for size in (32, 13):
        tokens, logits = read(plain, ids, attention_mask=mask, prefill_chunk_size=size)
        assert torch.equal(tokens, whole.sequences)
        assert (logits - torch.stack(whole.logits)).abs().max() < 1e-4


@pytest.mark.long
def test_every_family_that_is_named_is_one():
    assert {build(family).config.get_text_config().model_type for family in GENERATING} >= GO_ON
