"""One request as a user makes it: a prompt of P tokens, then D more, greedily, through `generate`, on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Until when what was launched on a device is done.
EDGES: dict[str, Callable[[], None]] = {"cpu": lambda: None, "cuda": torch.cuda.synchronize}


@dataclass
class Answer:
    """What a request took: the first token after `ttft_s`, `decode_s` for the last `len(tokens) - 1 - left_out`."""

    ttft_s: float
    decode_s: float
    tokens: list[int]
    left_out: int = 0
    prefill: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)


class Clock:
    """A streamer for `generate`, which calls `put` with the prompt and then with every token.

    Phases end with the first token, and `left_out` tokens later.
    """

    def __init__(self, on_phase: Callable[[], None], edge: Callable[[], None], left_out: int):
        self.times: list[float] = []
        self.decode_begun = 0.0
        self.tokens: list[int] = []
        self._on_phase, self._edge, self._ends, self._prompt_seen = on_phase, edge, {0, left_out}, False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ends = len(self.times) in self._ends
        if ends:
            self._edge()
        self.times.append(time.perf_counter())
        self.tokens += value.reshape(-1).tolist()
        if ends:
            self._on_phase()
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
    left_out: int = 0,
    **options: Any,
) -> Answer:
    """`1 + new_tokens` greedy tokens after `prompt` (ids); `counters()` is read where a phase begins or ends.

    The first `left_out` tokens after the first, fewer than `new_tokens`, do not count as decoded. `options` go to
    `generate`. A GPU is waited for where a phase ends; the last token is only seen once it is there.
    """
    input_ids = torch.tensor([prompt], device=device)
    marks = [counters()]
    clock = Clock(lambda: marks.append(counters()), EDGES[device], left_out)
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
    prefill, decode = ({n: b[n] - a[n] for n in a} for a, b in (marks[:2], marks[-2:]))
    return Answer(first - begun, last - clock.decode_begun, clock.tokens, left_out, prefill, decode)
