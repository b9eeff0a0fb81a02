"""Which resident expert gives way. One file a policy, standard library only; this table is all there is to register.

A policy belongs to one layer's cache and knows experts by number. It never sees a tensor or a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from .decayed_lfu import DecayedLFU
from .lru import LRU


class Policy(Protocol):
    """What the cache tells a policy, and asks of it."""

    def record(self, experts: Iterable[int], tokens: int) -> None:
        """The distinct `experts` of one event were used; the event covered `tokens` tokens."""

    def victim(self, candidates: Iterable[int]) -> int:
        """The candidate that should give way. Candidates are resident, not protected, and at least one."""

    def seed(self, rates: Sequence[float]) -> None:
        """Start from expected uses per token of each expert (a profile): a prior that use outweighs, never a pin."""


POLICIES: dict[str, Callable[[int, float], Policy]] = {
    "decayed_lfu": DecayedLFU,
    "lru": lambda experts, half_life: LRU(experts),
}

__all__ = ["LRU", "POLICIES", "DecayedLFU", "Policy"]
