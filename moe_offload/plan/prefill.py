"""How many tokens of a prompt are read at a time, so that what computing them takes stays within the plan's reserve.

    reserve               = KV cache + libraries + room for activations
    activations of a piece = tokens * (token_bytes + keys * pair_bytes) + keys * key_bytes

`keys` are all tokens that a piece attends to: those before it, and its own. Sizes are of one sequence; a batch takes
as many times as much. They are bounds of what one layer holds at once: layers run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..experts import MoELayer
from .budget import Plan
from .weights import hidden_size

LEAST_TOKENS = 128  # of a piece, all sequences together: each piece reads nearly all experts that have no slot


@dataclass(frozen=True)
class PrefillRoom:
    """What a plan keeps free for the activations of a prompt, and what they take."""

    room_bytes: int
    token_bytes: int
    pair_bytes: int
    key_bytes: int

    def most_tokens(self, keys: int, sequences: int = 1) -> int:
        """For how many tokens of each sequence there is room in one forward in which they attend to `keys`."""
        free = self.room_bytes // max(1, sequences) - keys * self.key_bytes
        return max(free // (self.token_bytes + keys * self.pair_bytes), -(-LEAST_TOKENS // max(1, sequences)))

    def piece_tokens(self, tokens: int, past: int = 0, sequences: int = 1) -> int:
        """Tokens of each sequence to read at a time of a prompt of `tokens`, after `past` ones that were read before.

        Pieces have one size, and the last is not much shorter: a last one of a single token would be computed as a
        step of decoding is, and 512 tokens and 8 take as long as twice 512.
        """
        pieces = -(-tokens // max(2, self.most_tokens(past + tokens, sequences)))
        return -(-tokens // max(1, pieces))


def prefill_room(model: Any, moe_layers: Sequence[MoELayer], plan: Plan) -> PrefillRoom:
    """The room for activations of prompts in the `plan` of a model, and what they take in it."""
    costs, config = plan.costs, model.config.get_text_config()
    itemsize = next(p.dtype for p in model.parameters() if p.is_floating_point()).itemsize
    hidden = hidden_size(model, moe_layers)
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    experts = max(_pairs(moe) * (4 * hidden + _widths(moe, hidden)) for moe in moe_layers)
    attention = 4 * heads * head_dim + 4 * hidden
    eager = getattr(config, "_attn_implementation", None) == "eager"
    beside = costs.kv_bytes + costs.library_bytes + costs.heap_bytes(plan.budget_bytes)
    return PrefillRoom(
        room_bytes=max(0, costs.reserve(plan.budget_bytes) - beside),
        token_bytes=max(experts, attention) * itemsize + 2 * hidden * itemsize,
        pair_bytes=(heads * (4 + 2 * itemsize) if eager else 0) + itemsize + 1,  # scores, and the mask
        key_bytes=2 * heads * head_dim * itemsize,  # keys and values of one layer, repeated for every query head
    )


def _pairs(moe: MoELayer) -> int:
    """Token-expert pairs of a token: where all experts compute all tokens, as many as there are experts."""
    return moe.num_experts if moe.form == "masked" else moe.top_k


def _widths(moe: MoELayer, hidden: int) -> int:
    """The sum of the widths of what one expert computes of one token: 2I and I of a gated one, whose matrices have 3IH
    elements."""
    return sum(math.prod(field.shape) for field in moe.unpacked.fields) // hidden
