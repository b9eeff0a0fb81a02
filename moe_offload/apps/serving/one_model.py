"""What transformers' request handlers are given: a manager that owns one model, and that model.

Its handlers ask a `ModelManager` for whatever a request names, and call `generate` on one thread, a request after the
other. The manager here has one answer. The model is the offloaded one itself, but for a `generate` that can be
cancelled, because a server that stops cannot wait for a thousand tokens.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.cli.serving.model_manager import ModelManager

from ...errors import ClosedError
from ...plan.weights import longest_context
from .failures import for_stream

logger = logging.getLogger("moe_offload")

#: For a model that was never trained to chat: what was said, line by line, for it to continue.
PLAIN_TEMPLATE = "{{ messages | map(attribute='content') | join('\n') }}"


class ServedModel:
    """The model as its requests see it. `generate` runs on the handlers' one thread; `cancel` may come from any."""

    def __init__(self, model: Any):
        self._model, self._cancelled = model, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """`model.generate`; raises ValueError for a prompt that is empty or longer than the model takes, ClosedError
        from the token after `cancel()`."""
        try:
            self._check_running()
            tokens, most = kwargs["input_ids"].shape[-1], longest_context(self._model)
            if tokens == 0:
                raise ValueError("the prompt is empty")
            if most is not None and tokens > most:
                raise ValueError(f"the prompt has {tokens} tokens, and the model takes {most} at most; shorten it")
            return self._model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([self._go_on]))
        except Exception as error:
            if "streamer" in kwargs and str(error):  # its cancellation, when the client has gone, says nothing
                raise for_stream(error) from error
            raise

    def cancel(self) -> None:
        """End what runs and what waits, with an error for whoever waits for it."""
        self._cancelled.set()

    def _go_on(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        """Asked after each token whether a sequence is done; B sequences of T tokens."""
        self._check_running()
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

    def _check_running(self) -> None:
        if self._cancelled.is_set():
            raise ClosedError("the server is stopping: this request was not finished; send it to another, or later")


class OneModel(ModelManager):
    """A ModelManager that never loads and never forgets. Requests for another name are refused (400)."""

    def __init__(self, model: ServedModel, tokenizer: Any, name: str):
        super().__init__(device="cpu")
        self.model, self.tokenizer, self.force_model = model, tokenizer, name
        self.created = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # no "@main" behind it: what is served is a folder as often as a repository

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.model, self.tokenizer

    async def load_model_streaming(self, model_id_and_revision: str, *_: Any, **__: Any) -> AsyncIterator[str]:
        """What `/load_model` answers, which transformers' chat asks before the first message."""
        event = {"status": "ready", "model": model_id_and_revision, "cached": True}
        if model_id_and_revision != self.force_model:
            event = {"status": "error", "model": model_id_and_revision, "message": f"only {self.force_model} is served"}
        yield f"data: {json.dumps(event)}\n\n"

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "created": self.created, "owned_by": "moe_offload"}]

    def shutdown(self) -> None:
        """Asked by `/reset` and at the end. The model belongs to whoever loaded it."""


def give_chat_template(tokenizer: Any, name: str) -> None:
    """A base model has no chat template: its messages become one plain text, begun like any other text of it."""
    if tokenizer.chat_template is not None:
        return
    logger.warning("%s has no chat template (a base model?): it continues the messages as one plain text", name)
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * begins + PLAIN_TEMPLATE
    # All that comes after the prompt is content. Without this, transformers looks for where the answer begins by the
    # marks of the model's family, does not find them, and answers with the prompt, too.
    content = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}
    if tokenizer.all_special_tokens:
        content["close"] = tokenizer.all_special_tokens
    tokenizer.response_template = {"start_anchor_pattern": r"\Z", "fields": {"content": content}}
