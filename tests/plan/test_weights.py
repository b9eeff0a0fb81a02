"""What a model weighs besides its experts."""

from __future__ import annotations

from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts
from moe_offload.plan.weights import kv_bytes, scores_bytes, take_fingerprint


def test_only_attention_that_is_not_fused_holds_its_scores():
    model = build("qwen3_moe")
    heads = model.config.num_attention_heads
    model.config._attn_implementation = "sdpa"
    assert scores_bytes(model, 16) == 0
    model.config._attn_implementation = "eager"
    assert scores_bytes(model, 16) == heads * 16 * 16 * (4 + 2 * model.dtype.itemsize)
    assert scores_bytes(model, 10**6) == scores_bytes(model, model.config.max_position_embeddings)


def test_the_width_of_a_configuration_with_names_of_its_own_is_that_of_the_embeddings():
    """Foreign code names it as it likes: taken for 1, it made an expert 3,670,016 wide, and its model a traceback."""
    model = build("qwen3_moe")
    moe_layers = find_experts(model)
    fingerprint, cache_bytes = take_fingerprint(model, moe_layers), kv_bytes(model, 10)
    vars(model.config)["hidden_size"] = None
    assert take_fingerprint(model, moe_layers) == fingerprint
    assert kv_bytes(model, 10) == cache_bytes > 0
    model.get_input_embeddings = lambda: None
    assert take_fingerprint(model, moe_layers) == fingerprint
