"""The default: use per token on two time scales, and which experts tend to follow those in use now.

    rate(e)  = rate_8(e) + rate_96(e)                                      rate_h: averaged with a half-life of h tokens
    score(e) = rate(e) + 3 * mean over f in the current set of P(e | f)    P: counted online

P(e | f): of the events one or two after a use of f, the share that used e. Routing of neighbouring tokens is correlated
beyond popularity and recency, and this is what these cannot see. To halve the cost, events count in turns for the set
before them and the set before that. Counts fade: those of f are halved when it has been followed 255 times. Of the
candidates only the 14 with the lowest slow rates are scored in full.

Share of the gap between LRU and MIN that is closed on ../shared/traces; per layer, warm, event-atomic, 25 % capacity:

                                            gpt-oss  intent  law   Qwen, one short request
    this, on the half it was made with      38.9     43.9    24.8  19.2
    this, on the other half                 37.5     43.0    25.3
    best of LRU, LFU, decayed LFU there     29.1     29.7    10.7

At 50 % it closes 27.8, 45.1 and 27.0; nowhere, warm or cold, is it more than 0.01 points below the best of those. What
was tried on the way, on the first half (gpt-oss: 40 requests of it), against 39.3 44.0 25.0 22.4 of all sets counted
and 16 candidates chosen by both rates:

    both rates alone (8 and 128)            30.2     21.5    10.3  14.9  four or five time scales: within 1.5 points
    a fitted mix of eleven time scales      29.8      9.7    10.8        ridge regression
    slow rate of 64; of 128                 39.8 43.7 24.9 21.5;         38.9 44.2 25.2 22.4
    weight 2 instead of 3                   38.1     41.7    23.6  22.4
    successors one event on; up to three    40.1 39.6 24.9 21.0;         37.6 43.9 23.9 21.5
    a context of four events, decaying      31.2     29.7    13.1        the current set says most
    all candidates in full; the lowest 8    the same within 0.1;         one to two points less
    events in turns; chosen by slow rate    0.1 to 0.7 less; up to 1.5 less: kept, both for the cost
Where nothing but the last use matters (a generated trace that LRU hits at 91 %) it is 0.4 points below LRU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from .decay import Rate

FAST, SLOW = 8.0, 96.0  # half-lives of the rates, tokens
WEIGHT = 3.0
HORIZON = 2  # events after which a use still counts as a successor
FADE = 255  # so that a count is one byte: E * E bytes a layer, not 32 times that in floats
DOUBT = 4  # an expert followed n times predicts with n / (n + DOUBT) of its shares
SHORTLIST = 14
LARGEST_CONTEXT = 32  # beyond, an event is a prompt or a large batch: everything follows everything

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
            row = by[f]
            for e in experts:
                row[e] += 1
            followed[f] += 1
            if followed[f] == FADE:
                followed[f] >>= 1
                by[f] = row.translate(_HALF)
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

    def _expect(self, experts: list[int], scores: list[float]) -> list[float]:
        """`scores`, and for each expert how much the current set lets expect it."""
        current = self.recent[0] if self.recent else []
        if len(experts) < 2 or not current:
            return scores  # nothing to choose, or to go by
        pick, weight = itemgetter(*experts), WEIGHT / len(current)
        terms = [(weight / (self.followed[f] + DOUBT), pick(self.by[f])) for f in current]
        terms += [(0.0, terms[0][1])] * (-len(terms) % 4)
        for (a, ws), (b, xs), (c, ys), (d, zs) in zip(*[iter(terms)] * 4, strict=True):  # four a turn: the hottest loop
            rows = zip(scores, ws, xs, ys, zs, strict=True)
            scores = [s + a * w + b * x + c * y + d * z for s, w, x, y, z in rows]
        return scores
