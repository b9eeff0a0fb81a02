"""Which KV caches a further piece of a prompt goes on from as if all of it had been read at once.

    keys and values of all tokens, or of the last ones (a sliding window)    any family
    states that sum up what was read (state space, linear attention)        families that are named here
    an index of which keys are worth attending to                           none: see below
    a kind of a family's own, a cache of its own                            none

Found by reading prompts of every family of transformers 5.23 at once and in pieces (`tests/patch/generation`): logits
differ by roundings (1e-5 at most, in float32), or the pieces are wrong. Those of jamba begin each piece from an empty
state. Indexed attention takes the best few keys, and of equal ones whichever comes first in a cache of that length.
"""

from __future__ import annotations

from typing import Any

KEPT = {"DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer", "DummyLayer"}
SUMMED = {
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
#: Families, by `model_type`, whose states go on from those of the piece before. Tried with transformers' own code on a
#: CPU: the kernels of other packages (mamba-ssm, causal-conv1d), which a GPU may get, were not.
GO_ON = {
    "bailing_hybrid",
    "granitemoehybrid",
    "inkling_text",
    "inkling2_text",
    "kimi_linear",
    "lfm2_moe",
    "nemotron_h",
    "qwen3_5_moe_text",
    "qwen3_next",
    "zaya",
}
#: Families, by `model_type`, whose attention takes the best few keys of those that are there, in a known cache.
PICKING = {"doge"}


def why_not_continued(model: Any, cache: Any) -> str:
    """Why a further piece of a prompt cannot go on from this cache of `model`'s; empty where it can."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if type(cache).__module__ != "transformers.cache_utils" or type(cache).__name__ == "EncoderDecoderCache":
        return f"its KV cache is a {type(cache).__name__}, a kind that is not known to go on"
    family = model.config.get_text_config().model_type
    if family in PICKING:
        return f"{family} attends to the best few keys of those that are there, which are others in pieces"
    known = KEPT | (SUMMED if family in GO_ON and model.device.type == "cpu" else set())
    if kinds - known:
        return f"the layers of its KV cache ({', '.join(sorted(kinds - known))}) are not known to go on in {family}"
    return ""
