"""What went wrong with a request, as OpenAI's clients read it, in an answer or in the middle of a stream.

    an answer       HTTP 400, 500 or 503      {"error": {"message": "...", "type": "ExpertReadError", "code": 500}}
    a stream        200 has been sent: an event of the same form; the client raises APIError with the message
    of responses    their own events, `error` and `response.failed`, with the message

Of what fails in a stream, transformers' handlers keep the words alone, and paste them between quotes. So the words are
the whole error as JSON (`for_stream`), and become it again on their way out (`told`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from jinja2 import TemplateError

from ...errors import ClosedError, OffloadError

logger = logging.getLogger("moe_offload")

#: What a request may cause that is the request's own fault: fields of the wrong kind, values `generate` refuses.
REQUEST_ERRORS = (ValueError, TypeError, KeyError, TemplateError)
#: What an error that says nothing is told as.
UNSAID = "the request failed, and nothing was said why; the server's log may tell"


def described(error: Exception) -> dict[str, Any]:
    """`error` as the value of "error" in an answer; "code" is the HTTP status."""
    words = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) or not str(error) else str(error)
    if isinstance(error, REQUEST_ERRORS) and not isinstance(error, OffloadError):
        return {"message": words, "type": "invalid_request_error", "code": 400}
    return {"message": words, "type": type(error).__name__, "code": 503 if isinstance(error, ClosedError) else 500}


def for_stream(error: Exception) -> RuntimeError:
    """What to raise in place of `error` in the midst of a stream. Logs what is not the request's own fault."""
    found = described(error)
    if found["code"] != 400:
        logger.error("a request failed: %s", error, exc_info=None if isinstance(error, OffloadError) else error)
    return RuntimeError(json.dumps(json.dumps(found))[1:-1])


async def told(events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """The events of a stream, those of errors as OpenAI's clients read them."""
    async with aclosing(events):
        async for some in events:
            yield "\n\n".join(map(_told, some.split("\n\n"))) if '"error"' in some else some


def _told(event: str) -> str:
    """One event, without its end."""
    try:
        data = json.loads(event.removeprefix("data: "))
    except ValueError:  # what is no data is not ours to change
        return event
    if isinstance(data.get("error"), str):
        data["error"] = _unpacked(data["error"])
    elif data.get("type") == "error":
        data["message"] = _unpacked(_unquoted(data["message"]))["message"]
    elif data.get("type") == "response.failed":
        error = data["response"]["error"]
        error["message"] = _unpacked(_unquoted(error["message"]))["message"]
    return f"data: {json.dumps(data)}"


def _unquoted(words: str) -> str:
    """Responses do not paste: what was made ready for it still is."""
    try:
        return str(json.loads(f'"{words}"'))
    except ValueError:
        return words


def _unpacked(words: str) -> dict[str, Any]:
    """What `for_stream` has packed; of an error that did not go through it, its words."""
    try:
        found = json.loads(words)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"message": words or UNSAID, "type": "server_error", "code": 500}
