"""What went wrong with a request, in OpenAI's form: the same object in an answer and in the middle of a stream.

{"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": "unsupported_value"}}

an answer   with the status of `RequestError`, or 500, or 503 once the model is closed
a stream    200 has been sent: an event of this form, then [DONE]; OpenAI's clients raise APIError with the message
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ....errors import ClosedError, OffloadError

logger = logging.getLogger("moe_offload")


class RequestError(OffloadError):
    """A request is not answered, for a reason that its client can do something about.

    Args:
        status: the HTTP status.
        message: what was asked, what was found, what to do; never a value of the request that may be large.
        param: the field that it is about, as OpenAI's clients read it.
        code: a word for programs, such as "model_not_found".
        retry_s: seconds after which to try again, sent as Retry-After.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_s: float = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s


def stopping_error() -> RequestError:
    """What a request is told that a server which stops has not finished."""
    return RequestError(
        503, "the server is stopping: this request was not finished; send it to another, or later", code="stopping"
    )


def error_body(error: Exception) -> dict[str, Any]:
    """`error` as JSON. Of what is neither the client's fault nor an error of ours, the server's log has the rest."""
    status, code, param = status_of(error), None, None
    if isinstance(error, RequestError):
        code, param, message = error.code, error.param, str(error)
    elif isinstance(error, OffloadError):
        code, message = type(error).__name__, str(error)
    elif isinstance(error, HTTPException):
        message = str(error.detail)
    else:
        code, message = type(error).__name__, "the request failed inside the server, whose log says more"
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    return 503 if isinstance(error, ClosedError) else 500


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed before anything was sent."""
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, RequestError) and error.retry_s:
        headers["Retry-After"] = str(math.ceil(error.retry_s))
    return JSONResponse(error_body(error), status_of(error), headers)


def error_event(error: Exception) -> str:
    """The event of a stream that has failed."""
    return f"data: {json.dumps(error_body(error))}\n\n"


def log_failure(error: Exception) -> None:
    """Write down what is not the client's fault: an error of ours in one line, any other with its traceback."""
    if status_of(error) >= 500 and not isinstance(error, RequestError):
        logger.error("a request failed: %s", error, exc_info=None if isinstance(error, OffloadError) else error)
