"""One request as a user makes it: a prompt of P tokens, then D more, greedily, through `generate`, on the clock.

    prompt | first token | steps left out | steps that count
           ^ settle      ^ or here        ^ settle          ^ settle

The clock waits for the device where a phase ends, never between steps. `generate` does, once a token, on every side
alike: it looks whether all sequences have ended, as it does for anybody who calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...files.system import disk_bytes_read


@dataclass
class Answer:
    """What a request took: the first token after `ttft_s`, `decode_s` for the last `len(tokens) - 1 - left_out`."""

    ttft_s: float
    decode_s: float
    tokens: list[int]
    left_out: int = 0
    prefill: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)  # of each token that counts, as the host saw them come


class Clock:
    """A logits processor for `generate`, which calls it once for each token, the first of which ends the prefill.

    Where tokens are `forced`, `generate` goes on with those, and what it would have chosen is in `chosen`.
    """

    def __init__(
        self,
        stops: set[int],
        settle: Callable[[], None],
        mark: Callable[[], dict[str, float]],
        forced: Sequence[int] | None = None,
    ):
        self.stops, self._settle, self._mark, self._forced = stops, settle, mark, forced
        self.calls = 0
        self.called_at: list[float] = []
        self.chosen: list[Tensor] = []
        self.marks: list[dict[str, float]] = []
        self.times: list[tuple[float, float]] = []  # when it stopped, and when it went on

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.calls in self.stops:
            self.stop()
        self.called_at.append(time.perf_counter())
        self.chosen.append(scores.argmax(-1))
        if self._forced is not None:
            scores = torch.full_like(scores, -torch.inf).index_fill_(
                1, self.chosen[-1].new_tensor([self._forced[self.calls]]), 0
            )
        self.calls += 1
        return scores

    def stop(self) -> None:
        self._settle()
        stopped = time.perf_counter()
        self.marks.append(self._mark())
        self.times.append((stopped, time.perf_counter()))


def random_prompt(vocabulary: int, tokens: int, seed: int) -> list[int]:
    """Token ids that mean nothing; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, min(vocabulary, 50_000), (tokens,), generator=generator)]


def ask_model(
    model: Any,
    prompt: list[int],
    new_tokens: int,
    mark: Callable[[], dict[str, float]] = dict,
    *,
    device: str = "cpu",
    settle: Callable[[], None] = lambda: None,
    left_out: int = 0,
    forced: Sequence[int] | None = None,
    **options: Any,
) -> Answer:
    """`1 + new_tokens` greedy tokens after `prompt` (ids); `mark()` is read wherever the clock stops.

    With `forced`, as many ids, those are what each next token is computed after, and the answer still has the model's
    own choices. The first `left_out` tokens after the first, fewer than `new_tokens`, do not count as decoded.
    `options` are those of `generate`.
    """
    from transformers import LogitsProcessorList

    input_ids = torch.tensor([prompt], device=device)
    clock = Clock({0, left_out}, settle, mark, forced)
    clock.stop()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=1 + new_tokens,
        min_new_tokens=1 + new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([clock]),
        **options,
    )
    clock.stop()
    (_, begun), (first, _), (_, resumed), (last, _) = (*clock.times[:2], *clock.times[-2:])
    prefill, decode = ({n: b[n] - a[n] for n in a} for a, b in (clock.marks[:2], clock.marks[-2:]))
    tokens = torch.cat(clock.chosen).tolist()
    steps_s = [after - before for before, after in pairwise([resumed, *clock.called_at[1 + left_out :]])]
    return Answer(first - begun, last - resumed, tokens, left_out, prefill, decode, steps_s)


def counted_read() -> dict[str, float]:
    """What this process has read from disks so far, where the system says it."""
    nbytes = disk_bytes_read()
    return {} if nbytes is None else {"disk_bytes": nbytes}
