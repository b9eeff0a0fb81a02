"""What the sides of the bench are asked, and what each of them did."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..plan import Plan
from .request import random_prompt


@dataclass(frozen=True)
class Effort:
    """How much a side is asked: slow ones are measured on less."""

    requests: int
    new_tokens: int
    warm_up_tokens: int  # -1: no warm-up request


EFFORT = {"accelerate": Effort(1, 2, -1), "mmap": Effort(1, 12, 8)}


@dataclass(frozen=True)
class Workload:
    """`requests` requests of `prompt_tokens` and `new_tokens`, after one to warm up."""

    folder: Path
    plan: Plan
    vocabulary: int
    routing: str | None = None
    prompt: Sequence[int] | None = None
    prompt_tokens: int = 512
    new_tokens: int = 32
    requests: int = 3
    packed: bool = False
    device: str = "cpu"

    def effort(self, side: str) -> Effort:
        least = EFFORT.get(side)
        if least is None:
            return Effort(self.requests, self.new_tokens, self.new_tokens)
        return Effort(least.requests, min(least.new_tokens, self.new_tokens), least.warm_up_tokens)

    def longest(self) -> int:
        """Tokens of the longest request of any side; a warm-up may be longer than what is measured."""
        decoded = max(self.new_tokens, *(least.warm_up_tokens for least in EFFORT.values()))
        return len(self.request(0)["prompt"]) + decoded

    def request(self, number: int) -> dict[str, Any]:
        """The prompt of one request and the row of the trace it begins at."""
        prompt = list(self.prompt or random_prompt(self.vocabulary, self.prompt_tokens, number))
        return {"prompt": prompt, "row": number * (len(prompt) + self.new_tokens)}


@dataclass
class Measured:
    """What one side did. `answers` leaves the warm-up out; `roofs` are bytes/s beside each answer."""

    side: str
    answers: list[dict[str, Any]] = field(default_factory=list)
    warm_up: dict[str, Any] | None = None
    roofs: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    peak_over_baseline: int = 0
    limited: str = ""
    failed: str = ""

    def median(self, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(answer) for answer in self.answers)
