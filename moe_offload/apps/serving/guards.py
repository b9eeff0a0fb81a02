"""What stands before every request: the key, the bounds on its body, and the line in the log when it has ended.

Nothing large is held or looked at on the event loop: a body is refused by its announced length, or as soon as it has
grown past the limit; what all bodies that are being received hold together is bounded, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from starlette.requests import Request

from .protocol.failures import RequestError, error_response, stopping_error
from .request_metrics import RequestMetrics

BODY_S = 60.0  # in which a body must have come
ALL_BODIES = 16  # of the longest length, received at the same time
DISCARD_S, MOST_DISCARDED = 10.0, 256 << 20  # bounds on what is let pass of a body that is too large
OPEN_PATHS = ("/health",)  # without a key, for whoever watches that the process lives
LEFT = 499  # the status in the log of a request whose client has not waited for the answer


class Guards:
    """An ASGI app around `app`.

    Args:
        app: what answers.
        metrics: hears of every request that has ended.
        api_key: what clients must send as `Authorization: Bearer ...`; None: nothing.
    """

    def __init__(self, app: Any, metrics: RequestMetrics, api_key: str | None = None):
        self.app, self._metrics = app, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = LEFT

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._key is not None and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
                await error_response(_no_key())(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            job = scope.get("moe_offload.job")
            if job is not None and job.left:
                status = LEFT
            host, port = scope.get("client") or ("-", 0)
            path = quote(scope["path"], safe="/%")[:256]  # one line, whatever was asked for
            self._metrics.ended(f"{host}:{port}", scope["method"], path, status, job)

    def _has_key(self, scope: Any) -> bool:
        found = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = found.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key or b"")


def _no_key() -> RequestError:
    return RequestError(
        401, "this server asks for a key: send it as Authorization: Bearer KEY (api_key= of the client)",
        code="invalid_api_key",
    )  # fmt: skip


class Bodies:
    """Reads bodies of `most_bytes` each."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self._held = most_bytes, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; RequestError if it is too large, too slow, or no JSON by its headers."""
        _check_headers(request)
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self.most_bytes):
            await _discard(request, request.stream())
            raise self._too_large()
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self._receive(request, parts), BODY_S)
            yield b"".join(parts)
        except asyncio.TimeoutError:
            raise RequestError(408, f"the body had not come after {BODY_S:.0f} s", code="timeout") from None
        except asyncio.CancelledError:  # by uvicorn, when a server that stops has waited long enough
            raise stopping_error() from None
        finally:
            self._held -= sum(map(len, parts))

    async def _receive(self, request: Request, parts: list[bytes]) -> None:
        length, stream = 0, request.stream()
        async for part in stream:
            length += len(part)
            if length > self.most_bytes:
                self._held -= sum(map(len, parts))
                parts.clear()
                await _discard(request, stream)
                raise self._too_large()
            if self._held + len(part) > ALL_BODIES * self.most_bytes:
                raise RequestError(429, "too many large bodies are being received; try again", retry_s=1)
            self._held += len(part)
            parts.append(part)

    def _too_large(self) -> RequestError:
        return RequestError(
            413,
            f"the body is larger than {self.most_bytes} bytes, which is more than the model's context can hold",
            code="request_too_large",
        )


async def _discard(request: Request, stream: AsyncIterator[bytes]) -> None:
    """Let the rest of a body pass, within bounds: a client that is cut off while it sends does not read why.

    `stream` is what was read from so far: a second one is refused where its last part has come already.
    """
    if "expect" in request.headers:  # it waits to be told whether to send
        return

    async def receive() -> None:
        passed = 0
        async for part in stream:
            passed += len(part)
            if passed > MOST_DISCARDED:
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(receive(), DISCARD_S)


def _check_headers(request: Request) -> None:
    """A page in a browser can send anything but JSON to another site, so that only JSON is taken."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "the body is JSON: send Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "the body is sent as it is: leave out Content-Encoding", code="unsupported_media_type")
