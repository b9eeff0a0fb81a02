"""One request as a user makes it: a prompt of P tokens, then D more, greedily, through `generate`, on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: Until when what was launched on a device is done.
EDGES: dict[str, Callable[[], None]] = {"cpu": lambda: None, "cuda": torch.cuda.synchronize}


@dataclass
class Answer:
    """What a request took: the first token after `ttft_s`, `decode_s` for the other `len(tokens) - 1`."""

    ttft_s: float
    decode_s: float
    tokens: list[int]
    prefill: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)

    @property
    def token_s(self) -> float:
        return self.decode_s / max(len(self.tokens) - 1, 1)


class Clock:
    """A streamer for `generate`, which calls `put` with the prompt and then with every token."""

    def __init__(self, on_first: Callable[[], None], edge: Callable[[], None]):
        self.times: list[float] = []
        self.decode_begun = 0.0
        self.tokens: list[int] = []
        self._on_first, self._edge, self._prompt_seen = on_first, edge, False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        first = not self.times
        if first:
            self._edge()
        self.times.append(time.perf_counter())
        self.tokens += value.reshape(-1).tolist()
        if first:
            self._on_first()
            self.decode_begun = time.perf_counter()  # reading counters off a device takes a while

    def end(self) -> None: ...


def random_prompt(vocabulary: int, tokens: int, seed: int) -> list[int]:
    """Token ids that mean nothing; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, min(vocabulary, 50_000), (tokens,), generator=generator)]


def ask(
    model: Any,
    prompt: list[int],
    new_tokens: int,
    counters: Callable[[], dict[str, float]] = dict,
    device: str = "cpu",
    **options: Any,
) -> Answer:
    """`1 + new_tokens` greedy tokens after `prompt` (ids); `counters()` is read at start, first token and end.

    `options` go to `generate`. A GPU is waited for before the request and at its first token; the last token is only
    seen once it is there.
    """
    input_ids = torch.tensor([prompt], device=device)
    marks = [counters()]
    clock = Clock(lambda: marks.append(counters()), EDGES[device])
    EDGES[device]()
    begun = time.perf_counter()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=1 + new_tokens,
        min_new_tokens=1 + new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
        **options,
    )
    marks.append(counters())
    first, last = clock.times[0], clock.times[-1]
    prefill, decode = ({n: b[n] - a[n] for n in a} for a, b in pairwise(marks))
    return Answer(first - begun, last - clock.decode_begun, clock.tokens, prefill, decode)
