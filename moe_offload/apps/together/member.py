"""One of several functions that one thread runs in turns: where it is, and what is its own.

A greenlet is a stack that another can take the place of, anywhere. Python's frames and context variables are its own;
what torch keeps for each thread is not: gradients are switched off outside of all of them (`Turns.run`), and random
numbers are exchanged here, where a function draws from a seed.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor

from .turn import Turn

A_PROMPT = 1 << 62  # tokens of a forward that nobody has said yet


class Member:
    """A `Turn` that has begun, or is about to."""

    def __init__(self, turn: Turn, parent: Any):
        self.turn, self.error = turn, None  # type: Turn, BaseException | None
        self.tokens = A_PROMPT  # of the forward that it is about to make
        self.at: Any = None  # the module that it waits to compute with others
        self.given: tuple[Tensor, ...] = ()
        self.result: Tensor | None = None  # of that module, if it was computed for all of them
        self.greenlet = greenlet(self._run, parent=parent)
        self.greenlet.gr_context = contextvars.copy_context()
        self._random: Tensor | None = None

    @property
    def ended(self) -> bool:
        return bool(self.greenlet.dead)

    def go_on(self) -> None:
        """Let it run until it waits for others, or ends."""
        self.at = None
        with self._own_random_numbers():
            self.greenlet.switch()

    def end(self, error: BaseException | None = None) -> None:
        """Let it fail where it waits; without an error as one that nobody waits for."""
        if self.greenlet:  # it has begun
            with self._own_random_numbers():
                self.greenlet.throw(GreenletExit() if error is None else error)
        else:
            self.error = error
            self.greenlet.throw()  # a greenlet that never ran is only marked as dead

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        if not self.turn.seeded:
            yield
            return
        outside = torch.get_rng_state()
        if self._random is not None:
            torch.set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)

    def _run(self) -> None:
        try:
            self.turn.run()
        except BaseException as error:  # the thread's other members go on; `Turns` says it to whom it concerns
            self.error = error
