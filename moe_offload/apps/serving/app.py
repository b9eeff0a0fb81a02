"""The ASGI app: routes, and what stands before them.

POST /v1/completions, /v1/chat/completions        answering.py
GET  /v1/models, /v1/models/NAME, /health
GET  /v1/moe_offload/stats, /metrics              counters of the experts, and of the requests
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import OffloadError, ServeError
from ...handle import Handle
from ..prompt_cache.cache import PromptCache
from . import LONGEST_QUEUE, TOGETHER_PACKAGES, require_packages
from .answering import Answering, unknown_model
from .generation import Generate, generate_answer
from .guards import LEFT, Guards
from .protocol import fields
from .protocol.failures import error_response
from .queue import Queue
from .request_metrics import RequestMetrics

logger = logging.getLogger("moe_offload")

KINDS: dict[str, type[fields.Common]] = {"/v1/completions": fields.Completion, "/v1/chat/completions": fields.Chat}
#: The chat template for a model that was never trained to chat: the messages line by line, for it to continue.
PLAIN_TEMPLATE = "{{ messages | map(attribute='content') | join('\n') }}"


class App:
    """Answers for the model of `handle`, requests one after the other or some together.

    Args:
        handle: of an offloaded model.
        tokenizer: its tokenizer; one without a chat template is given a plain one.
        name: what clients call the model.
        context: the most tokens of a prompt and its answer; None: what the model's configuration says.
        api_key: what clients must send as `Authorization: Bearer ...`; None: nothing.
        longest_queue: how many requests may wait beside those that run.
        parallel: how many requests are computed together, each as if it were alone.
        generate: what makes an answer, as `generate_answer` does.
        known: where that keeps what was read, if it does.

    Raises:
        ServeError: the model's generation settings ask for beams, which write no text token by token; or requests
            cannot be computed together.
    """

    def __init__(
        self,
        handle: Handle,
        tokenizer: Any,
        name: str,
        *,
        context: int | None = None,
        api_key: str | None = None,
        longest_queue: int = LONGEST_QUEUE,
        parallel: int = 1,
        generate: Generate = generate_answer,
        known: PromptCache | None = None,
    ):
        if (getattr(handle.model.generation_config, "num_beams", None) or 1) > 1:
            raise ServeError(f"{name}: its generation_config.json asks for beam search (num_beams); remove it to serve")
        give_chat_template(tokenizer, name)
        self._handle, self.name, self._created, self._registry = handle, name, int(time.time()), _registry(handle)
        self.queue = Queue(longest_queue, _in_turns(handle.model, parallel, known) if parallel > 1 else None)
        self._answering = Answering(handle.model, tokenizer, name, self.queue, context, generate, known)
        gets = {"/health": self._health, "/v1/models": self._models, "/v1/moe_offload/stats": self._stats}
        if self._registry is not None:
            gets["/metrics"] = self._metrics
        routes = [Route(path, self._generate, methods=["POST"]) for path in KINDS]
        routes += [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
        routes += [
            Route("/v1/models/{name:path}", self._one_model, methods=["GET"]),
        ]
        inner = Starlette(routes=routes)
        inner.router.redirect_slashes = False
        for error in (HTTPException, OffloadError, Exception):
            inner.add_exception_handler(error, _refuse)
        inner.add_exception_handler(ClientDisconnect, _forget)
        self._guarded = Guards(inner, RequestMetrics(self._registry, self.queue, {*KINDS, *gets}), api_key)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._guarded(scope, receive, send)

    def warm_up(self) -> None:
        """Compile what requests will run, so that none waits for it."""
        self._answering.warm_up()

    def check_ranks(self) -> None:
        """Raise `RankError` where another of the ranks that share the model has ended, or this one is out of step."""
        if self._handle.ranks is not None:
            self._handle.ranks.check()

    def close(self) -> None:
        """End what runs and what waits, with an error for whoever waits for it. Idempotent, from any thread."""
        self.queue.close()

    async def _generate(self, request: Request) -> Response:
        return await self._answering.answer(request, KINDS[request.scope["path"]])

    async def _health(self, _: Request) -> Response:
        """Whether requests are taken: 503 once the model is closed."""
        return JSONResponse({"status": "closed"}, 503) if self._handle.closed else JSONResponse({"status": "ok"})

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.name:
            raise unknown_model(name, self.name)
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "moe_offload"}

    def _stats(self, _: Request) -> Response:
        """Counters since the model was loaded: `handle.stats()`."""
        found = self._handle.stats()
        return JSONResponse({**dataclasses.asdict(found), "hit_rate": found.hit_rate})

    def _metrics(self, _: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def _in_turns(model: Any, parallel: int, known: PromptCache | None) -> Any:
    """What computes so many requests at once. It needs greenlet, which a server of one at a time does not."""
    require_packages(TOGETHER_PACKAGES)
    from ..together.turns import Turns

    if known is not None:
        raise ServeError("a prompt cache serves one request at a time: leave --prompt-cache out, or use --parallel 1")
    return Turns(model, parallel)


async def _refuse(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _forget(_: Request, __: Exception) -> Response:
    """The response to a client that has left; it is not sent."""
    return Response(status_code=LEFT)


def _registry(handle: Handle) -> Any:
    """The model's own metrics, to which those of the requests are added; None without prometheus_client."""
    with contextlib.suppress(ImportError):
        import prometheus_client  # noqa: F401

        return handle.metrics()
    return None


def give_chat_template(tokenizer: Any, name: str) -> None:
    """A base model has no chat template: its messages become one plain text, begun like any other text of it."""
    if tokenizer.chat_template is not None:
        return
    logger.warning("%s has no chat template (a base model?): it continues the messages as one plain text", name)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = "{{ bos_token }}" * begins + PLAIN_TEMPLATE
