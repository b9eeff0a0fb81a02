"""Whether guesses are worth it where the device makes them: enough of them are used, and steps take less time.

Neither is asked of the device: what has been used is seen a step late, in a copy that nobody waits for, and time is the
host's from one step to the next. Nothing but speed depends on the answer.

    on    fewer than half of the last 256 guessed rows were used  ->  off for 1024 steps, then on again
          steps are faster without (`Trial`)                      ->  off until the next trial
"""

from __future__ import annotations

from .guesses import Trial

WINDOW = 256  # guessed rows
LEAST = 0.5  # of them that must have been asked for
REST = 1024  # steps


class Guard:
    """`on` says whether to guess. Call `step` after each step, `skip` where something else came in between."""

    def __init__(self) -> None:
        self.trial = Trial()
        self._resting = 0  # steps for which too few guesses were right
        self._guessed = self._used = 0  # at the beginning of the window

    @property
    def on(self) -> bool:
        return self.trial.on and not self._resting

    def step(self, now_s: float, guessed: int, used: int) -> None:
        """One step more, which has come to its end at `now_s`; so many rows have been guessed, and used, in all."""
        self.trial.step(now_s)
        if self._resting:
            self._resting -= 1
            self._guessed, self._used = guessed, used
        elif guessed - self._guessed >= WINDOW:
            right, self._guessed, self._used = (used - self._used) / (guessed - self._guessed), guessed, used
            if right < LEAST:
                self._resting = REST

    def skip(self, guessed: int, used: int) -> None:
        """Something else was done: neither the time until the next step counts, nor what was guessed and used in it."""
        self.trial.skip()
        self._guessed, self._used = guessed, used
