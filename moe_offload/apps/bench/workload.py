"""What the sides of the bench are asked, and what each of them did."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...plan.budget import Plan
from .request import random_prompt


@dataclass(frozen=True)
class Effort:
    """How many requests and tokens a side is measured on: slow sides get fewer."""

    requests: int
    new_tokens: int
    warm_up_tokens: int  # -1: no warm-up request


EFFORT = {
    "cpu": {"accelerate": Effort(1, 2, -1), "mmap": Effort(1, 12, 8)},
    "cuda": {"accelerate": Effort(1, 4, 1)},
}
#: Decoded tokens of each request that do not count: generate() makes a KV cache for each, and a CUDA graph whose
#: addresses have changed is recorded anew. Not more than half of them.
LEFT_OUT = {"cpu": 0, "cuda": 8}
OURS = ("ours", "ours-host")
FORCED_SEED = 1_000_000  # far from the seeds of prompts


@dataclass(frozen=True)
class Workload:
    """`requests` requests of `prompt_tokens` and `new_tokens`, after one to warm up; inside each of `plans` in turn.

    The plans are named as they were asked for: "25%". `forced`: which tokens follow a prompt is drawn, not chosen by
    the model, as random weights soon repeat themselves. `touched_bytes` are what a decoded token computes with.
    """

    folder: Path
    plans: Mapping[str, Plan]
    vocabulary: int
    device: str = "cpu"
    routing: str | None = None
    prompt: Sequence[int] | None = None
    prompt_tokens: int = 512
    new_tokens: int = 32
    requests: int = 3
    packed: bool = False
    forced: bool = False
    touched_bytes: int = 0
    trust_remote_code: bool = False

    @property
    def row_bytes(self) -> int:
        return max(layer.row_bytes for plan in self.plans.values() for layer in plan.layers)

    @property
    def tokens(self) -> int:
        """Of one request."""
        return (len(self.prompt) if self.prompt else self.prompt_tokens) + self.new_tokens

    def effort(self, side: str) -> Effort:
        least = EFFORT[self.device].get(side)
        if least is None:
            return Effort(self.requests, self.new_tokens, self.new_tokens)
        return Effort(
            least.requests, min(least.new_tokens, self.new_tokens), min(least.warm_up_tokens, self.new_tokens)
        )

    def request(self, number: int, new_tokens: int) -> dict[str, Any]:
        """The prompt of one request, the row of the trace it begins at, and how much of it counts."""
        prompt = list(self.prompt or random_prompt(self.vocabulary, self.prompt_tokens, number))
        return {
            "prompt": prompt,
            "row": number * (len(prompt) + self.new_tokens),
            "new_tokens": new_tokens,
            "left_out": min(LEFT_OUT[self.device], new_tokens // 2),
            "forced": random_prompt(self.vocabulary, new_tokens + 1, FORCED_SEED + number) if self.forced else None,
        }


@dataclass
class Measured:
    """What one side did inside the plan that was `asked`. `answers` leaves the warm-up out; `roofs` are bytes/s beside
    each answer.

    `beside`: the resident model over the same requests, in turn where both fit.
    """

    side: str
    asked: str
    plan: Plan
    answers: list[dict[str, Any]] = field(default_factory=list)
    warm_up: dict[str, Any] | None = None
    roofs: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    baseline_bytes: int = 0
    peak_with_cache_bytes: int | None = None
    limited: str = ""
    failed: str = ""
    beside: Measured | None = None

    def median(self, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(answer) for answer in self.answers)


def count_steps(answer: dict[str, Any]) -> int:
    """Decoded tokens of one request that count."""
    return max(len(answer["tokens"]) - 1 - int(answer["left_out"]), 1)


def token_s(answer: dict[str, Any]) -> float:
    """Seconds of each decoded token that counts."""
    return float(answer["decode_s"] / count_steps(answer))
