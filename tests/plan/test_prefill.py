"""How many tokens of a prompt are read at a time: as many as there is room for, in pieces of one size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.apps.families.tiny import build
from moe_offload.config.settings import OffloadConfig
from moe_offload.experts import find_experts
from moe_offload.plan.budget import plan_slots
from moe_offload.plan.prefill import LEAST_TOKENS, PrefillRoom, prefill_room
from moe_offload.plan.weights import layer_shapes, sum_costs

ROOMS = st.builds(
    PrefillRoom,
    room_bytes=st.integers(0, 10**9),
    token_bytes=st.integers(1, 10**6),
    pair_bytes=st.integers(0, 600),
    key_bytes=st.integers(0, 20_000),
)


@given(ROOMS, st.integers(1, 10_000), st.integers(0, 10_000), st.integers(1, 64))
def test_pieces_fit_and_are_as_few_as_can_be(room, tokens, past, sequences):
    size, most = room.piece_tokens(tokens, past, sequences), room.most_tokens(past + tokens, sequences)
    pieces = -(-tokens // size)
    assert 1 <= size <= max(2, most) and size <= tokens
    assert (pieces - 1) * max(2, most) < tokens, "with one piece fewer they would not fit"


@given(ROOMS, st.integers(1, 10_000), st.integers(1, 64))
def test_more_room_is_never_more_pieces(room, tokens, sequences):
    larger = dataclasses.replace(room, room_bytes=2 * room.room_bytes + 1)
    assert larger.piece_tokens(tokens, 0, sequences) >= room.piece_tokens(tokens, 0, sequences)


def test_a_piece_is_within_the_room_where_that_is_not_too_small():
    room = PrefillRoom(room_bytes=10**8, token_bytes=10**5, pair_bytes=10, key_bytes=1000)
    size = room.piece_tokens(4096)
    assert LEAST_TOKENS < size < 4096
    assert size * (room.token_bytes + 4096 * room.pair_bytes) + 4096 * room.key_bytes <= room.room_bytes


def test_no_piece_of_a_single_token_at_the_end():
    """512 and 1 would be 257 and 256."""
    room = PrefillRoom(room_bytes=512, token_bytes=1, pair_bytes=0, key_bytes=0)
    assert room.piece_tokens(513) == 257


@pytest.mark.parametrize(("family", "eager"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_attention_that_holds_its_scores_has_room_for_fewer(family, eager):
    model = build(family, dtype=torch.bfloat16)
    moe_layers = find_experts(model)
    plan = plan_slots(10**7, layer_shapes(moe_layers), sum_costs(model, moe_layers, OffloadConfig()))
    room = prefill_room(model, moe_layers, plan)
    heads = model.config.num_attention_heads
    assert (room.pair_bytes > heads * 4) == eager
    assert room.most_tokens(100) > room.most_tokens(1000)


def test_all_experts_compute_all_tokens_of_a_model_with_one_product_over_them():
    llama4, qwen = (build(name) for name in ("llama4", "qwen3_moe"))
    rooms = []
    for model in (llama4, qwen):
        moe_layers = find_experts(model)
        plan = plan_slots(10**7, layer_shapes(moe_layers), sum_costs(model, moe_layers, OffloadConfig()))
        rooms.append(prefill_room(model, moe_layers, plan))
    assert rooms[0].token_bytes > 2 * rooms[1].token_bytes  # 8 experts, and not 2 of 8
