"""transformers' own FastAPI app, with its own handlers, for one offloaded model."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..errors import ClosedError, OffloadError
from ..handle import Handle
from .one_model import OneModel, ServedModel, give_chat_template

logger = logging.getLogger("moe_offload")


class Responses(ResponseHandler):
    """transformers streams responses unless it is asked not to; OpenAI's clients expect the opposite."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        return await super().handle_request({"stream": False, **body}, request_id)


#: build_server's parameters whose routes make sense for a model that writes text.
HANDLERS = {
    "chat_handler": ChatCompletionHandler,
    "completion_handler": CompletionHandler,
    "response_handler": Responses,
}
#: What a request may cause that is the request's own fault: fields of the wrong kind, values `generate` refuses.
REQUEST_ERRORS = (ValueError, TypeError, KeyError, TemplateError)


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
    # As a warning it says "[Request received]" for each; what goes wrong is told to the client.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
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
        from prometheus_client import make_asgi_app
    except ImportError:
        pass  # moe-offload[metrics]: the rest works without
    else:
        app.mount("/metrics", make_asgi_app(handle.metrics()))
    return app


def _refused(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return _answer(error.status_code, str(error.detail), "invalid_request_error")
    message = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return _answer(400, message, "invalid_request_error")


def _failed(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OffloadError):  # any other is logged by the server, with its traceback
        logger.error("a request failed: %s", error)
    return _answer(503 if isinstance(error, ClosedError) else 500, str(error), type(error).__name__)


def _answer(status: int, message: str, kind: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)
