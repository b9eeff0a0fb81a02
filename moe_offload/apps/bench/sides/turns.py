"""Sides that are alive at the same time and answer the same requests in turn, with the roof measured beside each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..roofs import disk as roofs
from ..workload import Measured, Workload, token_s
from .child import Child, SideFailed
from .contenders import drop_cache

SLACK_BYTES = 64 * 10**6  # what a process may hold beyond its budget, plus one row
LEAST_LIMIT = 600 * 10**6  # libraries and tracing take some 150 MB however small the model


class Roof(Protocol):
    """What whoever only moves bytes gets: from the disk, or over the link."""

    def measure(self, seed: int) -> float:
        """Bytes per second, now."""

    def details(self) -> dict[str, float]:
        """What else to say of it."""


@dataclass
class Running:
    """A side, loaded and warm; without `child`, it has failed."""

    first: Measured
    child: Child | None = None


class Stage:
    """Starts sides and asks them. `settings` are what every side is given; `say` hears what happens, line by line."""

    def __init__(self, work: Workload, settings: dict[str, Any], roof: Roof, say: Callable[[str], None]):
        self.work, self.settings, self.roof, self.say = work, settings, roof, say

    def start(self, side: str, asked: str, alive: ExitStack) -> Running:
        """Load the side inside the plan that was `asked`, and ask it once to warm it up. It ends with `alive`."""
        plan = self.work.plans[asked]
        one = Measured(side, asked, plan)
        running = Running(one)
        self.say(f"{side}: loading" if side == "resident" or len(self.work.plans) == 1 else f"{side} {asked}: loading")
        if self.work.device == "cpu":  # where experts come from the disk: what one side has read must not serve another
            drop_cache(self.work.folder, Path(self.settings["scratch"]))
        try:
            child = alive.enter_context(Child(side, {**self.settings, "budget": plan.budget_bytes}, self._limit(one)))
            one.loaded, one.limited, one.baseline_bytes = child.do("load"), child.limited, child.baseline_bytes
            tokens = self.work.effort(side).warm_up_tokens
            if tokens >= 0:
                one.warm_up = child.do("ask", **self.work.request(0, tokens))
            running.child = child
        except SideFailed as error:
            self._fails(one, error)
        return running

    def take_turns(self, team: Sequence[Running]) -> list[Measured]:
        """All requests, to each of the team in turn; what each did with them."""
        found = [replace(running.first, answers=[], roofs=[], reads=[]) for running in team]
        pairs = list(zip(team, found, strict=True))
        for number in range(1, self.work.requests + 1):
            # Turns change: whoever is first in one request is last in the next.
            for running, one in pairs if number % 2 else reversed(pairs):
                effort = self.work.effort(one.side)
                if running.child is not None and not one.failed and number <= effort.requests:
                    self._ask(running.child, one, number, effort.new_tokens)
        for running, one in pairs:
            if running.child is not None and not one.failed:
                one.memory = running.child.do("memory")
                one.peak_with_cache_bytes = running.child.peak_with_cache_bytes
        return found

    def _ask(self, child: Child, one: Measured, number: int, new_tokens: int) -> None:
        before = self.roof.measure(2 * number)
        try:
            if one.side == "ours" and self.work.device == "cpu":
                one.reads.append(child.do("read", seconds=roofs.SECONDS, seed=number)["bandwidth"])
            one.answers.append(child.do("ask", **self.work.request(number, new_tokens)))
        except SideFailed as error:
            self._fails(one, error)
            return
        one.roofs.append((before + self.roof.measure(2 * number + 1)) / 2)
        answer = one.answers[-1]
        self.say(
            f"{one.side}: request {number}: first token after {answer['ttft_s']:.2f} s, then "
            f"{token_s(answer) * 1e3:.3g} ms a token"
        )

    def _limit(self, one: Measured) -> int | None:
        """Bytes of RAM that the system is to hold a side to: all but the resident model, where it computes in RAM."""
        if one.side == "resident" or self.work.device != "cpu":
            return None
        return max(one.plan.budget_bytes + SLACK_BYTES + self.work.row_bytes, LEAST_LIMIT)

    def _fails(self, one: Measured, error: SideFailed) -> None:
        one.failed = str(error)
        self.say(one.failed)
