"""What a request is answered with: one JSON object, or events of server-sent events that end with [DONE]."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from ..generation import Piece, TokenLogprob
from ..queue import Job
from .fields import Chat, Common

DONE = "data: [DONE]\n\n"


class Choice:
    """One of the answers to a request, put together from its pieces."""

    def __init__(self) -> None:
        self.text, self.logprobs, self.finish_reason = "", [], None  # type: str, list[TokenLogprob], str | None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


class Form:
    """The form of the answers to one request.

    Args:
        asked: the request's fields.
        name: what the model is called.
        tokenizer: writes the tokens that log-probabilities are of.
    """

    def __init__(self, asked: Common, name: str, tokenizer: Any):
        self._asked, self._tokenizer, self._chat = asked, tokenizer, isinstance(asked, Chat)
        self._base: dict[str, Any] = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, choices: Iterable[Choice], job: Job) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        found = []
        for i, choice in enumerate(choices):
            said: dict[str, Any] = {"text": choice.text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            logprobs = self._logprobs(choice.logprobs)
            found.append({"index": i, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason})
        return {**self._base, "choices": found, "usage": count_usage(job)}

    def first(self, index: int) -> str:
        """The event that begins an answer of a chat; of a completion there is none."""
        return (
            self._event(index, {"role": "assistant", "content": "", "refusal": None}, None, None) if self._chat else ""
        )

    def piece(self, index: int, piece: Piece) -> str:
        """The events of one piece. OpenAI's chat says why it ended in an event of its own, without text."""
        logprobs = self._logprobs(piece.logprobs)
        if not self._chat:
            return self._event(index, piece.text, logprobs, piece.finish_reason)
        events = ""
        if piece.text or piece.logprobs:
            events = self._event(index, {"content": piece.text}, logprobs, None)
        return events + (self._event(index, {}, None, piece.finish_reason) if piece.finish_reason else "")

    def last(self, job: Job) -> str:
        """The events that end a stream without an error."""
        if not self._asked.include_usage:
            return DONE
        return _data({**self._chunk(), "choices": [], "usage": count_usage(job)}) + DONE

    def _event(self, index: int, said: Any, logprobs: Any, finish_reason: str | None) -> str:
        choice = {"index": index, "delta" if self._chat else "text": said, "logprobs": logprobs}
        found = {**self._chunk(), "choices": [{**choice, "finish_reason": finish_reason}]}
        return _data({**found, "usage": None} if self._asked.include_usage else found)

    def _chunk(self) -> dict[str, Any]:
        return {**self._base, "object": "chat.completion.chunk"} if self._chat else self._base

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.alternatives is None:
            return None
        if self._chat:
            entries = [
                {**self._token(t.id, t.logprob), "top_logprobs": [self._token(*x) for x in t.top]} for t in tokens
            ]
            return {"content": entries, "refusal": None}
        return {
            "tokens": [self._text(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self._text(id): logprob for id, logprob in reversed(t.top)} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._text(id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, id: int) -> str:
        return str(self._tokenizer.decode([id]))


def count_usage(job: Job) -> dict[str, Any]:
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.generated_tokens,
        "total_tokens": job.prompt_tokens + job.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": job.known_tokens},
    }


def _data(found: dict[str, Any]) -> str:
    return f"data: {json.dumps(found)}\n\n"
