"""Which expert is in which slot (`layer_cache.py`), and which resident expert gives way: a policy, one file each.

Adding a policy is a file and a line in `POLICIES`. A policy belongs to one layer's cache and knows experts by their
numbers; it never sees a tensor or a slot. May import errors and the standard library, so that the simulator runs this
very code; never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from .decayed_lfu import DecayedLFU
from .lfu import LFU
from .lrfu_classes import LRFUClasses
from .lru import LRU
from .successors import Successors
from .tiny_lfu import TinyLFU


class Policy(Protocol):
    """What the cache tells a policy, and asks of it."""

    def access(self, used: Mapping[int, int], tokens: int) -> None:
        """One event of `tokens` tokens used these experts: `{expert: how many of the tokens used it}`."""

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        """The `n` candidates that should give way, the first one first.

        The cache offers at least `n` candidates, and none of which a forward still needs.
        """

    def seed(self, rates: Sequence[float]) -> None:
        """Start from expected uses per token of each expert (a profile): a prior that use outweighs, never a pin."""


POLICIES: dict[str, Callable[[int, float], Policy]] = {
    "successors": lambda experts, half_life: Successors(experts),
    "decayed_lfu": DecayedLFU,
    "lfu": lambda experts, half_life: LFU(experts),
    "lrfu_classes": lambda experts, half_life: LRFUClasses(experts),
    "lru": lambda experts, half_life: LRU(experts),
    "tiny_lfu": lambda experts, half_life: TinyLFU(experts),
}

__all__ = [
    "LFU",
    "LRU",
    "POLICIES",
    "DecayedLFU",
    "LRFUClasses",
    "Policy",
    "Successors",
    "TinyLFU",
]
