"""Counters and profiles of all ranks together. Every rank calls these, and gets the same.

A rank counts its own experts by local numbers; a profile has all experts of the model, so it fits any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..cache.counters import Counters, LayerCounters
from ..errors import ProfileError
from ..experts import MoELayer
from ..observe.profile import Profile
from .group import Group


def gather_counters(group: Group, own: Counters) -> list[Counters]:
    """What each rank has counted, by rank."""
    return [Counters(**one) for one in group.exchange("counters", own.values(), "ask for the counters of all ranks")]


def gather_uses(group: Group, moe_layers: Sequence[MoELayer], own: Sequence[LayerCounters]) -> list[LayerCounters]:
    """Of each layer how often every expert of the model was used, whichever rank has it; `own` are this one's.

    Every rank sees all tokens where they share a batch, and only those sent to it where tokens are exchanged.
    """
    told = group.exchange("uses", [[one.tokens, one.counts] for one in own], "save a profile")
    merged = []
    for layer, moe in enumerate(moe_layers):
        counts = [count for rank in told for count in rank[layer][1]]
        tokens = max(max(rank[layer][0] for rank in told), moe.tokens_of(sum(counts)))
        merged.append(LayerCounters(tokens=tokens, counts=counts))
    return merged


def save_once(group: Group, profile: Profile, path: Path) -> Path:
    """Let rank 0 write `profile`, which all ranks have; return when it has. Raises `ProfileError` on all of them."""
    error = ""
    if group.rank == 0:
        try:
            profile.save(path)
        except ProfileError as failed:
            error = str(failed)
    error = group.exchange("saved", error, "save a profile")[0]
    if error:
        raise ProfileError(error)
    return path
