"""Whether this process is one of several, as `torchrun` and `accelerate launch` say in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Launched:
    """This process is `rank` of `world`, of which `here` run on this machine."""

    rank: int
    world: int
    here: int


def read_launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """What the launcher said; None in a process that is alone. Raises `ConfigError` for what makes no sense."""
    said = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(said) or said[1] == "1":
        return None
    here = environment.get("LOCAL_WORLD_SIZE") or "1"
    if not all(text.isdecimal() for text in (*said, here)) or int(said[0]) >= int(said[1]):
        raise ConfigError(
            f"the environment says RANK={said[0]!r}, WORLD_SIZE={said[1]!r}, LOCAL_WORLD_SIZE={here!r}, which make no "
            "rank; start the processes with torchrun or accelerate launch, or unset these variables"
        )
    return Launched(int(said[0]), int(said[1]), int(here))


def is_first() -> bool:
    """Whether this process is the one that speaks: rank 0, or the only one."""
    launched = read_launched()
    return launched is None or launched.rank == 0


def budget_of_rank(budget: Any) -> Any:
    """The budget of this process: of a list, or of text with commas, that of its rank; else what was given.

    Raises `ConfigError` where there are not as many as ranks.
    """
    launched = read_launched()
    ranks = 1 if launched is None else launched.world
    parts: Any = budget
    if isinstance(budget, str) and launched is not None and "," in budget:  # alone, the comma is a decimal one, refused
        parts = budget.split(",")
    if isinstance(parts, (str, bytes)) or not isinstance(parts, Sequence):
        return budget
    if len(parts) != ranks:
        raise ConfigError(
            f"budget={budget!r} names {len(parts)} budgets, and there are {ranks} processes; give one for all, or one "
            "for each"
        )
    part = parts[0 if launched is None else launched.rank]
    return part.strip() if isinstance(part, str) else part
