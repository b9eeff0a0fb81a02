"""Prompt or decoding: decided here and nowhere else.

Decoding repeats small forwards that the same experts serve again and again; a prompt reads nearly all experts of a
layer once. What is right for one is wrong for the other, so every file that treats them differently asks here.
"""

from __future__ import annotations


def is_decode(tokens: int) -> bool:
    """Whether a forward of so many `tokens` a sequence decodes: it adds one token to each sequence.

    A forward of more is (a piece of) a prompt, or checks what an assistant model has proposed.
    """
    return tokens <= 1


def fits_slots(pairs: int, slots: int) -> bool:
    """Whether an event of so many token-expert `pairs` may be resident together: it evicts as a decode step does.

    Pairs are counted, not distinct experts: a graph knows their number before it knows the ids.
    """
    return pairs <= slots
