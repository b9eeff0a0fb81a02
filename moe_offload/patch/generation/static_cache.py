"""Which KV cache `generate` gets where decode steps are CUDA graphs: a static one, of a few lengths, used again.

A cache that grows is another size at each step, and no step can be recorded. Whoever names a cache (its implementation,
or a cache of their own) gets that one.
"""

from __future__ import annotations

import logging
from typing import Any

from ...forward.batch_sizes import find_cache
from ...forward.graphs.kv_pool import KVPool, bucket_tokens

logger = logging.getLogger("moe_offload")
LONGER = (
    "a KV cache of %d tokens is more than the %d that the plan has room for, in use and kept (twice kv_tokens): it is "
    "not kept for the next request, which records its decode steps anew"
)
MODES = ("greedy_search", "sample")  # others go back in a cache, or have one of their own


def keep_static_caches(model: Any, pool: KVPool, planned_tokens: int) -> None:
    """Let `generate` of `model` take its static caches from `pool`, and a static one wherever nothing else is asked.

    The plan has room for a cache of `planned_tokens`.
    """
    if not hasattr(model, "_prepare_static_cache") or not hasattr(model, "_prepare_cache_for_generation"):
        return
    prepare, make = type(model)._prepare_cache_for_generation, type(model)._prepare_static_cache
    said: set[str] = set()

    def prepare_cache(generation_config: Any, model_kwargs: Any, generation_mode: Any, *rest: Any) -> Any:
        if generation_config.cache_implementation is None:
            obstacle = _obstacle(model, generation_config, model_kwargs, str(generation_mode.value))
            if obstacle is None:
                generation_config.cache_implementation = "static"  # of this call: generate works on a copy
            elif obstacle not in said:
                said.add(obstacle)
                logger.info("generate() decodes without CUDA graphs, which is slower: %s", obstacle)
        return prepare(model, generation_config, model_kwargs, generation_mode, *rest)

    def prepare_static(cache_implementation: str, batch_size: int, max_cache_len: int, *rest: Any, **named: Any) -> Any:
        def make_new() -> Any:
            model._previous_max_cache_length = -1  # by which transformers makes each cache as long as the longest yet
            return make(model, cache_implementation, batch_size, length, *rest, **named)

        length = max_cache_len
        if "offloaded" in cache_implementation or model.config.is_encoder_decoder:
            return make_new()
        length = bucket_tokens(max_cache_len, planned_tokens)
        if batch_size * length > pool.most_tokens and LONGER not in said:
            said.add(LONGER)
            logger.info(LONGER, batch_size * length, pool.most_tokens)
        return pool.lend(batch_size, length, make_new)

    model.__dict__["_prepare_cache_for_generation"] = prepare_cache
    model.__dict__["_prepare_static_cache"] = prepare_static


def _obstacle(model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: str) -> str | None:
    """Why this call of `generate` gets no static cache unless it asks for one."""
    from transformers.utils.generic import is_flash_attention_requested

    if mode not in MODES or generation_config.is_assistant:
        return f"its mode is {mode}, of which static caches are not known to be right"
    if generation_config.use_cache is False or find_cache(model_kwargs) is not None:
        return "it was told which KV cache to use, or to use none"
    if not getattr(model, "_can_compile_fullgraph", False) or model.config.is_encoder_decoder:
        return f"transformers does not say that {type(model).__name__} can decode with a static KV cache"
    if is_flash_attention_requested(model.config):
        return "flash attention needs the attention mask with a static KV cache; cache_implementation='static' gives it"
    return None
