"""The protocol through which metrics and notebook see an offloaded model; its handle implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..cache.counters import Stats


class Watched(Protocol):
    """An offloaded model as metrics and notebook see it: facts that may be read from any thread."""

    compile: str
    implementation: str

    @property
    def tiers(self) -> Sequence[str]:
        """Where each layer's rows rest."""

    @property
    def name(self) -> str:
        """What the model calls itself."""

    @property
    def plan(self) -> Any:
        """The plan in force: `budget_bytes`, `rows()`, `layers`, `residency`, `expert_bytes`."""

    @property
    def closed(self) -> bool:
        """Whether files and memory were given back."""

    def stats(self) -> Stats:
        """Counters as of now."""
