"""What a model weighs besides its experts."""

from __future__ import annotations

from moe_offload.apps.families.tiny import build
from moe_offload.plan.weights import scores_bytes


def test_only_attention_that_is_not_fused_holds_its_scores():
    model = build("qwen3_moe")
    heads = model.config.num_attention_heads
    model.config._attn_implementation = "sdpa"
    assert scores_bytes(model, 16) == 0
    model.config._attn_implementation = "eager"
    assert scores_bytes(model, 16) == heads * 16 * 16 * (4 + 2 * model.dtype.itemsize)
    assert scores_bytes(model, 10**6) == scores_bytes(model, model.config.max_position_embeddings)
