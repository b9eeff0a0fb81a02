"""Prompt or decoding, at the edges."""

from __future__ import annotations

import pytest

from moe_offload.cache import POLICIES
from moe_offload.cache.layer_cache import LayerCache
from moe_offload.cache.phase import is_decode


@pytest.mark.parametrize(("tokens", "decodes"), [(0, True), (1, True), (2, False), (512, False)])
def test_a_forward_of_one_token_a_sequence_decodes(tokens, decodes):
    assert is_decode(tokens) is decodes
    assert not is_decode(tokens, begun=False), "the first token of a sequence is its prompt"


def test_an_event_fits_where_each_of_its_pairs_could_have_a_slot():
    cache = LayerCache(8, 4, POLICIES["lru"](8, 100.0))
    assert cache.fits(4) and not cache.fits(5)
