"""One answer of the model: `generate` with what one request asks for, its tokens handed on as they come.

Names: P tokens of a prompt, T tokens of prompt and answer, B = 1 sequence, V entries of the vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers import SequenceBiasLogitsProcessor as LogitBias

from .text import TextBuilder


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a request asks for beside its prompt; the fields are OpenAI's, where they have such a name.

    config: the model's own settings with the request's on top, `max_new_tokens` among them.
    top_logprobs: how many alternatives to report per token; None: no log-probabilities at all.
    """

    config: GenerationConfig
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token that was generated, and what else might have been: pairs of id and log-probability, likeliest first.

    `offset` is where its text begins in the answer, in characters.
    """

    id: int
    logprob: float
    offset: int
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What can be sent of an answer: some text, and the log-probabilities of the tokens that it is made of."""

    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None  # of the last piece: "stop" or "length"


Generate = Callable[
    [Any, Any, list[int], Sampling, Callable[[], None], Callable[[Piece], None], Callable[[], bool]], None
]


def generate_answer(
    model: Any,
    tokenizer: Any,
    prompt_ids: list[int],
    sampling: Sampling,
    on_token: Callable[[], None],
    on_piece: Callable[[Piece], None],
    gone: Callable[[], bool],
    generate: Callable[..., Any] | None = None,
) -> None:
    """Generate one answer, by `generate` or else the model's own. `on_token` is called for each token, `on_piece` for
    what can be sent, the last one with a reason; from the token after `gone()` is true there is nothing more, and no
    last piece."""
    answer = _Answer(tokenizer, prompt_ids, sampling, on_token, on_piece, gone)
    processors = LogitsProcessorList()
    if sampling.top_logprobs is not None:
        processors.append(answer.record_logprobs)
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(Penalties(len(prompt_ids), sampling.presence_penalty, sampling.frequency_penalty))
    if sampling.logit_bias:
        processors.append(LogitBias([[[id], float(bias)] for id, bias in sampling.logit_bias.items()]))
    ids_1P = torch.tensor([prompt_ids], device=model.device)
    own_stops = {"tokenizer": tokenizer} if sampling.config.stop_strings else {}
    with _seeded(sampling.seed, ids_1P.device):
        (generate or model.generate)(
            ids_1P,
            attention_mask=torch.ones_like(ids_1P),
            generation_config=sampling.config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([answer.is_done]),
            **own_stops,
        )
    if not gone():
        answer.finish()


class _Answer:
    """What `generate` calls after each step."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: list[int],
        sampling: Sampling,
        on_token: Callable[[], None],
        on_piece: Callable[[Piece], None],
        gone: Callable[[], bool],
    ):
        eos = sampling.config.eos_token_id
        self._eos = {eos} if isinstance(eos, int) else set(eos or ())
        self._most, self._wanted = sampling.config.max_new_tokens, sampling.top_logprobs
        self._text, self._seen, self._prompt = TextBuilder(tokenizer, sampling.stop), len(prompt_ids), len(prompt_ids)
        self._on_token, self._on_piece, self._gone = on_token, on_piece, gone
        self._logprobs_V: Tensor | None = None
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is not sent yet
        self._ended = False

    def record_logprobs(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """A logits processor that changes nothing: it stands before those of the request and before sampling."""
        self._logprobs_V = torch.log_softmax(scores_BV[0].float(), dim=-1)
        return scores_BV

    def is_done(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion, asked after each token."""
        for id in ids_BT[0, self._seen :].tolist():
            if self._text.stopped:
                break
            self._seen += 1
            self._on_token()
            offset = len(self._text.text)
            if id in self._eos:
                self._ended = True
            else:
                self._text.add(id)
                if self._wanted is not None:
                    self._logprobs.append(self._logprob(id, offset))
        piece = self._text.take()
        if piece:
            self._send(piece)
        done = self._text.stopped or self._gone()
        return torch.full((len(ids_BT),), done, dtype=torch.bool, device=ids_BT.device)

    def finish(self) -> None:
        """Send what was held back, and why it ended."""
        length = not (self._text.stopped or self._ended) and self._seen - self._prompt >= (self._most or 0)
        self._send(self._text.take(last=True), "length" if length and not self._text.stopped else "stop")

    def _send(self, text: str, reason: str | None = None) -> None:
        whole = reason is not None and not self._text.stopped
        ready = [one for one in self._logprobs if whole or one.offset < self._text.sent]
        self._logprobs = self._logprobs[len(ready) :]  # offsets only grow
        self._on_piece(Piece(text, ready, reason))

    def _logprob(self, id: int, offset: int) -> TokenLogprob:
        assert self._logprobs_V is not None and self._wanted is not None
        best = self._logprobs_V.topk(self._wanted)
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprob(id, float(self._logprobs_V[id]), offset, top)


class Penalties(LogitsProcessor):
    """OpenAI's formula, over the tokens of the answer: logit - count * frequency - (count > 0) * presence."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float):
        self.prompt_tokens, self.presence, self.frequency = prompt_tokens, presence, frequency

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        said_BT = ids_BT[:, self.prompt_tokens :]
        ones_BT = torch.ones_like(said_BT, dtype=scores_BV.dtype)
        counts_BV = torch.zeros_like(scores_BV).scatter_add_(1, said_BT, ones_BT)
        return scores_BV - counts_BV * self.frequency - (counts_BV > 0) * self.presence


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside it random numbers begin at `seed`; whoever else draws some in this process goes on from where it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
