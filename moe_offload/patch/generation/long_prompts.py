"""`generate` reads a prompt in pieces where the plan's reserve has no room for the activations of all of it.

transformers has that already (`prefill_chunk_size`), for whoever knows how large a piece may be. So all that is here
is the size, prompt by prompt, where none was given. What does not go in pieces is read as it ever was.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...forward.batch_sizes import find_cache
from ...plan.prefill import PrefillRoom
from .kv_kinds import why_not_continued

logger = logging.getLogger("moe_offload")

#: Arguments of a forward that transformers cuts with the tokens, or that do not depend on them.
CUT = {"attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"}


def read_in_pieces(model: Any, room: PrefillRoom) -> None:
    """Let `generate` of `model` read prompts in pieces for which there is `room`."""
    prefill: Callable[..., Any] | None = getattr(type(model), "_prefill", None)
    if prefill is None:  # a model that generates nothing
        return
    held, said = weakref.ref(model), set[str]()

    def prefill_in_pieces(
        ids_BT: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        given, model = generation_config.prefill_chunk_size, held()
        if given is None:
            tokens, past = _length(ids_BT, generation_config, model_kwargs)
            size = room.piece_tokens(tokens, past, len(ids_BT))
            why = _obstacle(model, generation_config, model_kwargs) if size < tokens else ""
            if size < tokens and not why:
                logger.info("a prompt of %d tokens is read %d at a time, for which the budget has room", tokens, size)
                generation_config.prefill_chunk_size = size  # of this call: generate works on a copy
            elif why and why not in said:
                said.add(why)
                logger.warning(
                    "a prompt of %d tokens is read in one piece, and the budget has room for %d at a time: %s",
                    tokens, size, why,
                )  # fmt: skip
        try:
            return prefill(model, ids_BT, generation_config, model_kwargs, *rest, **more)
        finally:
            generation_config.prefill_chunk_size = given

    model.__dict__["_prefill"] = prefill_in_pieces


def _length(ids_BT: Tensor, generation_config: Any, model_kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """How many tokens of each sequence are to be read, and how many are in the KV cache: `ids_BT` are all or the new
    ones, and the mask tells which, as in transformers' own `_prefill`."""
    cache, tokens = find_cache(model_kwargs), ids_BT.shape[1]
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = model_kwargs.get("attention_mask")
    whole = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", tokens)
    return (tokens - past if whole == tokens else tokens), past


def _obstacle(model: Any, generation_config: Any, model_kwargs: Mapping[str, Any]) -> str:
    """Why this prompt does not go in pieces; empty where it does."""
    if model.config.is_encoder_decoder:
        return "an encoder reads its input whole"
    cache = find_cache(model_kwargs)
    if cache is None:
        return "without a KV cache of transformers' (use_cache), there is nothing that a further piece could go on from"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "output_attentions and output_hidden_states are of all tokens at once"
    given = [
        name for name, value in model_kwargs.items() if isinstance(value, (Tensor, Mapping, list)) and name not in CUT
    ]
    if given:
        return f"{', '.join(sorted(given))} goes with all tokens of it"
    return why_not_continued(model, cache)
