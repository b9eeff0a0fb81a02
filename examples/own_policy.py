"""Add a policy of your own and compare it: beside LRU, the default, and Belady's MIN, which nothing can beat.

python examples/own_policy.py [TRACE.npz ...]        without a trace: one that is generated here, of drifting topics
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moe_offload import Trace
from moe_offload.apps.simulate.run import simulate
from moe_offload.apps.simulate.show import format_table


class SecondChance:
    """Least recently used, but what has been used in two of the last eight events stays once more."""

    def __init__(self, num_experts: int):
        self.now = 0
        self.last = [-1] * num_experts
        self.before = [-1] * num_experts  # the use before the last one

    def access(self, used, tokens):
        self.now += 1
        for e in used:
            self.before[e], self.last[e] = self.last[e], self.now

    def victims(self, candidates, n):
        return sorted(candidates, key=lambda e: (self.now - self.before[e] <= 8, self.last[e]))[:n]

    def seed(self, rates):
        """A profile, should there be one: rank by expected use, before any real one."""
        self.last = [rate - max(rates) - 1 for rate in rates]


def drifting(tokens: int = 2000, layers: int = 4, experts: int = 64, k: int = 6) -> Trace:
    """Every 100 tokens another topic of five, each with hot experts of its own, and some of the last token again."""
    rng = np.random.default_rng(0)
    topics = rng.gumbel(size=(5, layers, experts)) * 0.6
    scores = topics[np.repeat(rng.integers(5, size=tokens // 100), 100)] + rng.gumbel(size=(tokens, layers, experts))
    scores[1:] += 0.5 * scores[:-1]
    return Trace.of(np.argsort(-scores, axis=2)[:, :, :k], num_experts=[experts] * layers)


def main() -> None:
    given = {Path(path).stem: Trace.load(path) for path in sys.argv[1:]}
    mine = {"second_chance": lambda experts, half_life: SecondChance(experts)}
    policies = ["lru", "second_chance", "default", "belady"]
    print(format_table(simulate(given or {"generated": drifting()}, policies, ["25%", "50%"], extra=mine)))


if __name__ == "__main__":
    main()
