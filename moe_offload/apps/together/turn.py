"""What is to be run in turns with others. It needs no greenlet, so that a queue can be imported without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """What is to be run in turns with others.

    Args:
        run: calls the model, with one sequence at a time.
        done: is told how it has ended: None, or the error. It is called between two steps.
        seeded: whether it draws random numbers from a seed, and so must not see who else draws some.
        workload: what its usage is counted for; None: for whatever it is counted at the moment.
    """

    run: Callable[[], None]
    done: Callable[[Exception | None], None]
    seeded: bool = False
    workload: str | None = None
