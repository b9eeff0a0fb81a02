"""Text from tokens: piece by piece it is what the tokenizer says of all of them, up to a stop string."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moe_offload.apps.serving.text import TextBuilder

from .conftest import MODEL

TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


def pieces(ids: list[int], stop: list[str]) -> list[str]:
    """What is sent after each token, and at the end."""
    builder, sent = TextBuilder(TOKENIZER, stop), []
    for id in ids:
        builder.add(id)
        sent.append(builder.take())
        if builder.stopped:
            return sent
    return [*sent, builder.take(last=True)]


@settings(max_examples=300)
@given(st.text(max_size=40), st.lists(st.integers(1, 4095), max_size=12))
def test_the_pieces_are_the_text(text: str, more: list[int]) -> None:
    """Any text, and any tokens, also those that are half a character."""
    ids = TOKENIZER(text)["input_ids"] + more
    assert "".join(pieces(ids, [])) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=300)
@given(
    st.text("abAB ëか\n", max_size=40), st.lists(st.text("abAB ëか\n", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_it_ends_before_the_first_stop_string_that_is_whole(text: str, stop: list[str]) -> None:
    """The one that a reader who sees the text grow finds first; of several that end together, the one that begins
    first. A token may hold more than it, so that the text is cut inside a token."""
    ids = TOKENIZER(text)["input_ids"]
    said = "".join(pieces(ids, stop))
    assert text.startswith(said) and not any(one in said for one in stop)
    if any(one in text for one in stop):
        assert any(text[len(said) :].startswith(one) for one in stop)
    else:
        assert said == text


def test_what_may_become_a_stop_string_waits() -> None:
    ids = [TOKENIZER(letter)["input_ids"][0] for letter in "abcab"]
    assert pieces(ids, ["abx"]) == ["", "", "abc", "", "", "ab"]


def test_a_character_waits_for_its_last_byte() -> None:
    ids = TOKENIZER("か")["input_ids"]
    sent = pieces(ids, [])
    assert "".join(sent) == "か" and all("\ufffd" not in piece for piece in sent)
    assert pieces(ids[:1], []) == ["", "\ufffd"] if len(ids) > 1 else True
