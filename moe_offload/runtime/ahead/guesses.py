"""`Guesses`: which experts the next layer will probably be asked for; `Trial`: whether loading them early pays.

Whether it pays is measured while the model runs: a few steps with it, a few without, in turn, and the median decides.

    with  without  with  without ...  |  the winner, for a while  |  with  without ...
    ──────── trial ─────────────────     ─────── verdict ────────    ── trial again ──

Steps in both settings meet the same noise, so that neither a busy machine nor a hard prompt decides. What is tried must
not change the results of a step, only its time: here, whether guessed experts are loaded.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..in_flight import Arrivals

BLOCK = 8  # steps in one setting before the other has its turn
BLOCKS = 8  # of both together, in a trial
VERDICT = 1024  # steps that a verdict holds


class Guesses:
    """The last guess, until the event it was made in has asked for its own rows; and whether guessing pays."""

    def __init__(self) -> None:
        self.trial = Trial()
        self.waiting = False  # whether one is held back
        self._arrivals: Arrivals | None = None
        self._experts: Sequence[int] = ()

    def hold_back(self, arrivals: Arrivals, experts: Sequence[int]) -> None:
        """A guess at what the layer of `arrivals` will be asked for. Nothing is read until `start`."""
        self._arrivals, self._experts = arrivals, experts
        self.waiting = True

    def start(self) -> None:
        """Load the guess that was held back: the reads that this layer needs have been queued before it."""
        arrivals, self._arrivals = self._arrivals, None
        self.waiting = False
        if arrivals is not None:
            arrivals.guess(self._experts)


class Trial:
    """`on` says whether to load guesses now. Call `step(now_s)` when a step begins, `skip()` if it is not
    to be timed."""

    def __init__(self) -> None:
        self.on = True
        self.paid: bool | None = None  # the last verdict
        self._taken_s: dict[bool, list[float]] = {True: [], False: []}
        self._steps = 0
        self._began_s: float | None = None

    def step(self, now_s: float) -> None:
        if self._began_s is not None and self._in_trial() and (self._steps - 1) % BLOCK:
            self._taken_s[self.on].append(now_s - self._began_s)  # not the first of a block: it pays for the last one
        self._began_s = now_s
        self._steps += 1
        if self._steps == BLOCK * BLOCKS:
            self.paid = self.on = self._pays()
        elif self._in_trial():
            self.on = self._steps // BLOCK % 2 == 0
        elif self._steps == BLOCK * BLOCKS + VERDICT:
            self._steps, self.on = 0, True
            self._taken_s = {True: [], False: []}

    def skip(self) -> None:
        """Leave the time since the last step out: something else came between, such as a prompt or a pause."""
        self._began_s = None

    def _in_trial(self) -> bool:
        return self._steps < BLOCK * BLOCKS

    def _pays(self) -> bool:
        times = self._taken_s
        return bool(times[True]) and statistics.median(times[True]) < statistics.median(times[False] or [float("inf")])
