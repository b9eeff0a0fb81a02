"""The numbers of a run in words: one headline, and advice that follows from this run alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import TypeVar

from ...config.sizes import format_size
from ...observe.trace.recorder import ForwardRecord
from ..simulate.run import FIRST_TOKENS as FIRST
from .run_record import RunBudget, RunForward, RunRecord

AnyForward = TypeVar("AnyForward", bound=ForwardRecord)
WORTH = 0.02  # hit rate: a smaller gain is not worth a line of advice


@dataclass(frozen=True)
class Summary:
    """Totals of a run. Rates are shares, 0 to 1; None where nothing was asked or decoded.

    `best_rate` is that of a cache that knows the future and begins empty; None for a run that did not begin so.
    `first_token_s` is from the call with the prompt to that with the first token, `token_s` from one token to the next;
    compiling is in neither, but in `compile_s`.
    """

    prompt_tokens: int
    decoded: int
    hit_rate: float | None
    best_rate: float | None
    first_rate: float | None
    later_rate: float | None
    token_s: float | None
    waiting: float | None
    first_token_s: float | None
    compile_s: float
    read_per_token: float | None


def sum_up_run(run: RunRecord) -> Summary:
    decode = find_decoding(run)
    tokens = sum(forward.tokens for forward in decode)
    spent = _spent_s(run)
    decode_s = sum(s for forward, s in zip(run.forwards, spent, strict=True) if forward.decode)
    prompt = list(takewhile(lambda forward: not forward.decode, run.forwards))
    return Summary(
        prompt_tokens=sum(forward.tokens for forward in run.forwards) - tokens,
        decoded=tokens,
        hit_rate=hit_rate_of(run.forwards),
        best_rate=_best(run),
        first_rate=hit_rate_of(decode[:FIRST]),
        later_rate=hit_rate_of(decode[FIRST:]),
        token_s=decode_s / tokens if tokens else None,
        waiting=sum(forward.stall_s for forward in run.forwards) / sum(spent) if sum(spent) else None,
        first_token_s=sum(spent[: len(prompt)]) if prompt else None,
        compile_s=sum(forward.compile_s for forward in run.forwards),
        read_per_token=sum(forward.bytes_read for forward in decode) / tokens if tokens else None,
    )


def find_decoding(run: RunRecord) -> list[RunForward]:
    """The forwards that added a token; those of a prompt, also of a later one in a chat, are not among them."""
    return [forward for forward in run.forwards if forward.decode]


def first_forwards(forwards: Sequence[AnyForward]) -> list[AnyForward]:
    """Those of the prompt, and the first 32 after it."""
    prompt = sum(1 for _ in takewhile(lambda forward: not forward.decode, forwards))
    return list(forwards[: prompt + FIRST])


def hit_rate_of(forwards: Sequence[RunForward], best: bool = False) -> float | None:
    asked = sum(forward.requests for forward in forwards)
    return sum(forward.best if best else forward.hits for forward in forwards) / asked if asked else None


def _spent_s(run: RunRecord) -> list[float]:
    """Seconds that each forward took, without compiling. The time before a forward that decodes (choosing the token)
    belongs to it; the time before a prompt is the user's."""
    spent = []
    for forward, following in zip_longest(run.forwards, run.forwards[1:]):
        until_s = following.began_s if following is not None and following.decode else forward.ended_s
        spent.append(max(until_s - forward.began_s - forward.compile_s, 0.0))
    return spent


def _best(run: RunRecord) -> float | None:
    best, mine = hit_rate_of(run.forwards, best=True), hit_rate_of(run.forwards)
    return None if best is None or mine is None or best < mine or run.profile is not None else best


def write_headline(run: RunRecord) -> str:
    s = sum_up_run(run)
    if s.hit_rate is None:
        return "Nothing ran: there is no token to report."
    speed = f"{1 / s.token_s:.1f} tokens a second" if s.token_s else "A prompt and no further token"
    best = f" (at best: {s.best_rate:.0%})" if s.best_rate is not None else ""
    waiting = f", {s.waiting:.0%} of the time spent waiting for experts" if s.waiting is not None else ""
    return f"{speed}; {s.hit_rate:.0%} of what was asked for was resident{best}{waiting}."


def write_advice(run: RunRecord) -> list[str]:
    """Sentences, the most useful first; none where there is nothing to say."""
    s = sum_up_run(run)
    if s.hit_rate is None:
        return []
    return [*_on_budget(run), *_on_waiting(s), *_on_policy(s), *_on_profile(run, s)]


def _on_budget(run: RunRecord) -> list[str]:
    here = min(run.curve, key=lambda point: abs(point.budget_bytes - run.budget_bytes), default=None)
    if here is None or run.profile is not None:  # the curve begins empty
        return []
    more = [p for p in run.curve if p.budget_bytes > here.budget_bytes and p.hit_rate > here.hit_rate + WORTH]
    said = []
    if more:
        knee = max(more, key=lambda p: (p.hit_rate - here.hit_rate) / (p.budget_bytes - here.budget_bytes))
        said.append(
            f"A budget of {_about(knee)} would have hit about {knee.hit_rate:.0%} on this run{_saving(here, knee)}."
        )
        enough = next((p for p in more if p.hit_rate >= 0.95), None)
        if enough is not None and enough != knee:
            said.append(f"For 95 % of hits it takes {_about(enough)}.")
    else:
        said.append("More memory would hardly have changed the hit rate of this run.")
    less = [p for p in run.curve if p.budget_bytes < here.budget_bytes and p.hit_rate >= here.hit_rate - WORTH]
    if less:
        said.append(f"{_about(less[0])} would have done nearly as well: {less[0].hit_rate:.0%} of hits.")
    return said


def _on_waiting(s: Summary) -> list[str]:
    if s.waiting is None or s.read_per_token is None:
        return []
    if s.waiting > 0.3:
        return [
            "Reading experts was the wall: a faster disk, a packed copy (moe-offload pack) or more memory would tell."
        ]
    if s.waiting < 0.1:
        return ["Reading experts was not the wall: the processor was. More memory would save little time."]
    return []


def _on_policy(s: Summary) -> list[str]:
    if s.hit_rate is None or s.best_rate is None:
        return []
    points = 100 * (s.best_rate - s.hit_rate)
    return [
        f"No cache of this size, not even one that knows the future, could have hit more than {points:.0f} points more."
    ]


def _on_profile(run: RunRecord, s: Summary) -> list[str]:
    if run.profile is not None and run.cold_first_hits is not None:
        first = first_forwards(run.forwards)
        hits, asked = sum(x.hits for x in first), sum(x.requests for x in first) or 1
        return [
            f"The profile {run.profile}: {format_size(run.prewarm_bytes)} were read before the first token, and the "
            f"prompt with the first {FIRST} tokens hit {hits / asked:.0%} instead of {run.cold_first_hits / asked:.0%}."
        ]
    if s.first_rate is not None and s.later_rate is not None and s.later_rate > s.first_rate + 0.05:
        return [
            f"The first {FIRST} tokens hit {s.first_rate:.0%}, all later ones {s.later_rate:.0%}: a profile of such "
            "text would help at the start (moe-offload profile record)."
        ]
    return []


def _about(point: RunBudget) -> str:
    return f"{format_size(point.budget_bytes)} ({point.residency:.0%} of the experts)"


def _saving(here: RunBudget, there: RunBudget) -> str:
    saved = here.bytes_per_token - there.bytes_per_token
    return f", and read {format_size(int(saved))} less a token" if saved > 0 else ""
