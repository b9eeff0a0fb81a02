"""transformers' own FastAPI app, with its own handlers, for one offloaded model."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ...errors import OffloadError
from ...handle import Handle
from .failures import REQUEST_ERRORS, described, told
from .one_model import OneModel, ServedModel, give_chat_template

logger = logging.getLogger("moe_offload")


class Told:
    """Mixed into a handler: what goes wrong in the middle of a stream is told as OpenAI's clients read it."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        answer = await super().handle_request(body, request_id)  # type: ignore[misc]
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = told(answer.body_iterator)  # type: ignore[arg-type]  # they stream text
        return answer


class Chat(Told, ChatCompletionHandler):
    """/v1/chat/completions"""


class Completions(Told, CompletionHandler):
    """/v1/completions"""


class Responses(Told, ResponseHandler):
    """transformers streams responses unless it is asked not to; OpenAI's clients expect the opposite."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        return await super().handle_request({"stream": False, **body}, request_id)


#: build_server's parameters whose routes make sense for a model that writes text.
HANDLERS = {
    "chat_handler": Chat,
    "completion_handler": Completions,
    "response_handler": Responses,
}


class NotServed:
    """Stands for the handlers of other kinds of models (audio, decisions), which come and go with transformers."""

    async def handle_request(self, *_: Any) -> None:
        raise HTTPException(501, "this server writes text: use chat completions, completions or responses")


def build_app(handle: Handle, tokenizer: Any, name: str) -> FastAPI:
    """The app that answers for `handle`'s model under `name`; `app.state.model.cancel()` ends what it is generating.

    transformers' routes (/v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health),
    /v1/moe_offload/stats, and /metrics where prometheus_client is installed. Requests are answered one after the other.
    Gives `tokenizer` a plain chat template if it has none.
    """
    give_chat_template(tokenizer, name)
    # As a warning it says "[Request received]" for each, as an error what failures.py says; the client is told as well.
    logging.getLogger("transformers.cli.serving").setLevel(logging.CRITICAL)
    model = ServedModel(handle.model)
    manager, state = OneModel(model, tokenizer, name), GenerationState()
    given: dict[str, Any] = {"model_manager": manager, "generation_state": state}
    for parameter in inspect.signature(build_server).parameters:
        if parameter in HANDLERS:
            given[parameter] = HANDLERS[parameter](model_manager=manager, generation_state=state)
        elif parameter.endswith("_handler"):
            given[parameter] = NotServed()
    app: FastAPI = build_server(**given)
    app.state.model = model
    for refused in (HTTPException, *REQUEST_ERRORS):
        app.add_exception_handler(refused, _refused)
    for failed in (OffloadError, Exception):
        app.add_exception_handler(failed, _failed)

    @app.get("/v1/moe_offload/stats")
    def stats() -> dict[str, Any]:
        """Counters since the model was loaded: `handle.stats()`."""
        found = handle.stats()
        return {**dataclasses.asdict(found), "hit_rate": found.hit_rate}

    try:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    except ImportError:
        pass  # the extra `metrics`: the rest works without
    else:
        registry = handle.metrics()
        app.get("/metrics")(lambda: Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST))
    return app


def _refused(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return _answer({"message": str(error.detail), "type": "invalid_request_error", "code": error.status_code})
    return _answer({**described(error), "type": "invalid_request_error", "code": 400})


def _failed(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OffloadError):  # any other is logged by the server, with its traceback
        logger.error("a request failed: %s", error)
    return _answer(described(error))


def _answer(error: dict[str, Any]) -> JSONResponse:
    return JSONResponse({"error": error}, error["code"])
