"""The default: use per token on two time scales, and which experts tend to follow those in use now.

    rate(e)  = rate_8(e) + rate_96(e)                                      rate_h: averaged with a half-life of h tokens
    score(e) = rate(e) + 3 * mean over f in the last event of P(e | f)    P: counted while running

P(e | f) is the share of the events one or two after a use of f that used e: neighbouring tokens are routed alike beyond
popularity and recency, which the rates cannot see. To halve the cost, an event counts in turns for the event before it
and the one before that. Counts fade: those of f are halved when it has been followed 255 times. Of the candidates only
the 14 with the lowest slow rates are scored in full.

What it is worth, and what was tried on the way: docs/policies.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from .decay import Rate

FAST, SLOW = 8.0, 96.0  # half-lives of the rates, tokens
WEIGHT = 3.0
HORIZON = 2  # events after which a use still counts as a successor
FADE = 255  # counts are halved there, so that one fits a byte: E * E bytes a layer, an 32nd of Python's floats
DOUBT = 4  # an expert followed n times predicts with n / (n + DOUBT) of its shares
SHORTLIST = 14
LARGEST_CONTEXT = 32  # an event of more experts is a prompt or a large batch, and says nothing of what follows what

_HALF = bytes(count >> 1 for count in range(256))


class Successors:
    def __init__(self, num_experts: int):
        self.fast, self.slow = Rate(num_experts, FAST), Rate(num_experts, SLOW)
        self.followed = [0] * num_experts  # [f]: events that followed a use of f and were counted for it
        self.by = [bytearray(num_experts) for _ in range(num_experts)]  # [f][e]: those that used e
        self.recent: list[list[int]] = []  # the sets of the last events, the current one first
        self.turn = 0  # which of them the next event is counted for

    def access(self, used: Mapping[int, int], tokens: int) -> None:
        self.fast.add(used, tokens)
        self.slow.add(used, tokens)
        if len(used) > LARGEST_CONTEXT:
            self.recent = []
            return
        experts = sorted(used)
        self.turn = (self.turn + 1) % HORIZON
        by, followed = self.by, self.followed
        for f in self.recent[self.turn] if self.turn < len(self.recent) else ():
            if followed[f] >= FADE:  # Ctrl-C has come before they were halved
                self._fade(f)
            followed[f] += 1  # first, and halved last: wherever Ctrl-C comes, no count in its row is larger
            row = by[f]
            for e in experts:
                row[e] += 1
            if followed[f] >= FADE:
                self._fade(f)
        self.recent = [experts, *self.recent[: HORIZON - 1]]

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        fast, slow = self.fast.used, self.slow.used
        short = sorted(candidates, key=slow.__getitem__)[: max(n, SHORTLIST)]
        a, b = self.fast.share / self.fast.unit, self.slow.share / self.slow.unit
        score = dict(zip(short, self._expect(short, [a * fast[e] + b * slow[e] for e in short]), strict=True))
        return sorted(short, key=score.__getitem__)[:n]

    def seed(self, rates: Sequence[float]) -> None:
        """Both rates start there. A use per token is at most 1, so use outweighs any profile within a few hundred."""
        top = max(1.0, max(rates, default=0.0))
        for rate in (self.fast, self.slow):
            rate.seed([r / top for r in rates])

    def _fade(self, f: int) -> None:
        self.by[f] = self.by[f].translate(_HALF)
        self.followed[f] >>= 1

    def _expect(self, experts: list[int], scores: list[float]) -> list[float]:
        """`scores`, each with WEIGHT * mean P(e | f) added, over the experts f of the last event."""
        current = self.recent[0] if self.recent else []
        if len(experts) < 2 or not current:
            return scores  # one candidate, or no event yet
        pick, weight = itemgetter(*experts), WEIGHT / len(current)
        terms = [(weight / (self.followed[f] + DOUBT), pick(self.by[f])) for f in current]
        terms += [(0.0, terms[0][1])] * (-len(terms) % 4)
        for (a, ws), (b, xs), (c, ys), (d, zs) in zip(*[iter(terms)] * 4, strict=True):  # four a turn: the hottest loop
            rows = zip(scores, ws, xs, ys, zs, strict=True)
            scores = [s + a * w + b * x + c * y + d * z for s, w, x, y, z in rows]
        return scores
