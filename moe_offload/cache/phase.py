"""Prompt or decoding, by the tokens of a forward and those before it: decided here and nowhere else.

`LayerCache.fits` asks by the slots.

Decoding repeats small forwards that the same experts serve again and again; a prompt reads nearly all experts of a
layer once. What is right for one is wrong for the other, so every file that treats them differently asks here.
"""

from __future__ import annotations


def is_decode(tokens: int, begun: bool = True) -> bool:
    """Whether a forward of so many `tokens` a sequence decodes: it adds one token to each sequence.

    A forward of more is (a piece of) a prompt, or checks what an assistant model has proposed. One token of a sequence
    that has not `begun` (its KV cache is empty) is a prompt as well.
    """
    return begun and tokens <= 1
