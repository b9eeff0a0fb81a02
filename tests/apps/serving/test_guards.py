"""What stands before a request, over bare sockets: bounds, keys, clients that leave, and HTTP in its corners."""

from __future__ import annotations

import json
import logging
import socket
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn")

from moe_offload.apps.serving import ACCESS

from .conftest import NAME, read_status, started, wait_until

JSON = "Content-Type: application/json"
LONG = {"model": NAME, "prompt": "Il comando", "max_tokens": 1900, "temperature": 0}
SHORT = {**LONG, "max_tokens": 2}
PATH = "/v1/completions"


def connect(served) -> socket.socket:
    return socket.create_connection((urlsplit(served.url).hostname, urlsplit(served.url).port), timeout=120)


def head(method: str, path: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", *headers, "", ""]).encode()


def ask(served, body: bytes, *headers: str, path: str = PATH, method: str = "POST", version: str = "1.1"):
    """Status, headers and body of the answer."""
    length = () if any("ength" in h or "ransfer" in h for h in headers) else (f"Content-Length: {len(body)}",)
    with connect(served) as sock:
        sock.sendall(head(method, path, "Connection: close", *length, *(headers or (JSON,)), version=version) + body)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), top.decode().lower(), rest


def read_end(sock: socket.socket) -> bytes:
    """What comes before the other side closes; a reset, where it had not read all that was sent, is an end, too."""
    try:
        return b"".join(iter(lambda: sock.recv(65536), b""))
    except ConnectionResetError:
        return b""


def error_of(answer) -> tuple[int, dict]:
    status, _, body = answer
    return status, json.loads(body)["error"]


def post(served, fields) -> tuple[int, str, bytes]:
    return ask(served, json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"model": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"model": 5}', "model"),
        (b'{"model": "polyglot", "prompt": "\\ud800"}', "JSON"),
        (b'{"model": "polyglot", "prompt": "a", "max_tokens": 1e400}', "max_tokens"),
        (b'{"model": "polyglot", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"model": "polyglot", "prompt": [' + b"1," * 200_000 + b"1]}", "200001 tokens"),
        (b'{"model": "polyglot", "prompt": "' + b"secret " * 50_000 + b'"}', "context of 2048"),
        (b'{"model": "polyglot", "temperature": "' + b"secret" * 1000 + b'"}', "temperature"),
        (b'{"' + b"secret" * 10_000 + b'": 1, "model": "polyglot"}', "no field"),
    ],
    ids=range(16),
)
def test_a_body_that_cannot_be_understood(served, body, says) -> None:
    """In OpenAI's form, and in few words: of what was sent at most the beginning of a name comes back."""
    answer = ask(served, body)
    status, error = error_of(answer)
    assert status == 400 and error["type"] == "invalid_request_error" and says in error["message"]
    assert len(answer[2]) < 700 and b"secret" * 11 not in answer[2]


def test_a_large_body_is_refused_and_not_held(served, monkeypatch) -> None:
    """Announced, or sent in chunks; a client that sends all of it reads why, and is answered again."""
    monkeypatch.setattr("moe_offload.apps.serving.guards.DISCARD_S", 3600.0)
    bodies = served.app._answering._bodies
    limit = bodies.most_bytes
    status, error = error_of(ask(served, b" " * (limit + 1)))
    assert (status, error["code"]) == (413, "request_too_large") and str(limit) in error["message"]
    assert error_of(ask(served, b"", JSON, f"Content-Length: {limit + 1}", "Expect: 100-continue"))[0] == 413
    with connect(served) as sock:
        sock.sendall(head("POST", PATH, JSON, "Transfer-Encoding: chunked") + chunks(limit + 1) + b"0\r\n\r\n")
        assert read_status(sock) == 413
        sock.sendall(head("GET", "/health"))
        assert read_status(sock) == 200
    assert bodies._held == 0


def test_a_large_body_without_an_end_is_answered(served, monkeypatch) -> None:
    monkeypatch.setattr("moe_offload.apps.serving.guards.DISCARD_S", 0.1)
    bodies = served.app._answering._bodies
    assert error_of(ask(served, b"", JSON, "Content-Length: " + "9" * 19))[0] == 413
    with connect(served) as sock:
        sock.sendall(head("POST", PATH, JSON, "Transfer-Encoding: chunked") + chunks(bodies.most_bytes + 1))
        assert read_status(sock) == 413
    assert bodies._held == 0


def chunks(length: int) -> bytes:
    """At least `length` bytes of a body in chunks, without the last one."""
    return (b"10000\r\n" + b" " * 65536 + b"\r\n") * -(-length // 65536)


def test_a_body_that_does_not_come(served, monkeypatch) -> None:
    monkeypatch.setattr("moe_offload.apps.serving.guards.BODY_S", 0.1)
    assert error_of(ask(served, b"{", JSON, "Content-Length: 100"))[0] == 408


def test_what_all_bodies_hold_together_is_bounded(served, monkeypatch) -> None:
    monkeypatch.setattr("moe_offload.apps.serving.guards.ALL_BODIES", 0)
    assert error_of(post(served, SHORT))[0] == 429
    assert served.app._answering._bodies._held == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Content-Type: text/plain",), 415),
        (("Content-Type: application/x-www-form-urlencoded",), 415),
        ((JSON, "Content-Encoding: gzip"), 415),
        (("Content-Type: Application/JSON; charset=utf-8",), 200),
    ],
)
def test_only_json_is_taken(served, headers, status) -> None:
    assert ask(served, json.dumps(SHORT).encode(), *headers)[0] == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", PATH, 405),
        ("HEAD", "/health", 200),
        ("HEAD", "/v1/models", 200),
        ("PUT", "/v1/models", 405),
        ("GET", "/nowhere", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/health", 200),
    ],
)
def test_methods_and_paths(served, method, path, status) -> None:
    answer = ask(served, b"", method=method, path=path)
    assert answer[0] == status
    if status >= 400:
        assert error_of(answer)[1]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0(served, stream) -> None:
    status, _, body = ask(served, json.dumps({**SHORT, "stream": stream}).encode(), version="1.0")
    assert status == 200 and (body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)["choices"])


@pytest.mark.parametrize(
    "said", [b"", b"POST /v1/comp", head("POST", PATH, JSON)[:-2]], ids=["idle", "line", "headers"]
)
def test_a_connection_that_says_nothing_whole_is_closed(served, monkeypatch, said) -> None:
    monkeypatch.setattr("moe_offload.apps.serving.connections.SILENT_S", 0.05)
    with connect(served) as sock:
        sock.sendall(said)
        assert read_end(sock) == b""


def test_a_connection_whose_answer_takes_long_is_not_closed(served, slow, monkeypatch) -> None:
    """Its timer has gone off several times by then; it is set when a connection is made, so that this one's is short
    only once its request has come."""
    monkeypatch.setattr("moe_offload.apps.serving.connections.SILENT_S", 3600.0)
    with connect(served) as sock:
        body = json.dumps({**SHORT, "max_tokens": 20}).encode()
        sock.sendall(head("POST", PATH, JSON, f"Content-Length: {len(body)}") + body)
        wait_until(lambda: served.app.queue.running)
        monkeypatch.setattr("moe_offload.apps.serving.connections.SILENT_S", 0.05)
        connections = list(served.server._uvicorn.server_state.connections)
        (protocol,) = [each for each in connections if each.cycle and not each.cycle.response_complete]
        protocol.loop.call_soon_threadsafe(protocol._close_if_silent)
        assert read_status(sock) == 200


def test_a_connection_too_many_is_closed(served, monkeypatch) -> None:
    monkeypatch.setattr("moe_offload.apps.serving.connections.MOST", 0)
    monkeypatch.setattr("moe_offload.apps.serving.connections.SILENT_S", 3600.0)
    with connect(served) as sock:
        assert read_end(sock) == b""
    monkeypatch.undo()
    assert post(served, SHORT)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(served, slow, stream) -> None:
    """Running or waiting: its tokens are not made, and the next is answered."""
    queue = served.app.queue
    body = json.dumps({**LONG, "stream": stream}).encode()
    request = head("POST", PATH, JSON, f"Content-Length: {len(body)}") + body
    with connect(served) as running, connect(served) as waiting:
        running.sendall(request)
        wait_until(lambda: queue.running and queue.running[0].generated_tokens > 0)
        job = queue.running[0]
        waiting.sendall(request)
        wait_until(lambda: len(queue) == 1)
        (behind,) = queue._waiting
    assert post(served, SHORT)[0] == 200
    assert job.left and job.generated_tokens < 1900 and behind.left and behind.generated_tokens == 0


def test_a_full_queue_says_when_to_try_again(served, slow, monkeypatch) -> None:
    monkeypatch.setattr(served.app.queue, "longest", 0)
    body = json.dumps(LONG).encode()
    with connect(served) as running:
        running.sendall(head("POST", PATH, JSON, f"Content-Length: {len(body)}") + body)
        wait_until(lambda: served.app.queue.running)
        status, top, answer = post(served, SHORT)
    assert status == 429 and "retry-after: " in top and json.loads(answer)["error"]["type"] == "rate_limit_error"
    wait_until(lambda: not served.app.queue.running)


def test_a_key_is_asked_for_but_of_who_watches_the_process(monkeypatch) -> None:
    with started(api_key="s3cret") as served:
        for header in ("Authorization: Bearer wrong", "Authorization: s3cret", "X: y", "Authorization: Bearer s3cre"):
            status, error = error_of(ask(served, json.dumps(SHORT).encode(), JSON, header))
            assert (status, error["code"]) == (401, "invalid_api_key") and "s3cret" not in error["message"]
        for path in ("/v1/models", "/v1/moe_offload/stats", "/metrics", "/nowhere"):
            assert ask(served, b"", method="GET", path=path)[0] == 401
            assert ask(served, b"", "Authorization: bearer s3cret", method="GET", path=path)[0] in (200, 404)
        assert ask(served, b"", method="GET", path="/health")[0] == 200
        assert ask(served, json.dumps({}).encode(), JSON, "Authorization: Bearer s3cret")[0] == 400


def test_a_line_per_request(served, caplog) -> None:
    with caplog.at_level(logging.INFO, ACCESS):
        post(served, SHORT)
        ask(served, b"", method="GET", path="/x%0a%22y")
        ask(served, b"{", JSON)
        wait_until(lambda: len(caplog.messages) == 3)
    good, strange, bad = caplog.messages
    assert f"POST {PATH} 200 prompt_tokens=" in good and "generated_tokens=2 first_token_s=" in good
    assert "tokens_per_s=" in good and "\n" not in strange and "GET /x%0A%22y 404" in strange
    assert bad.endswith(f"POST {PATH} 400")


def test_requests_are_counted_and_timed(served) -> None:
    def sample(name: str) -> float:
        text = ask(served, b"", method="GET", path="/metrics")[2].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    ok = 'moe_offload_serve_requests_total{path="/v1/completions",status="200"}'
    names = [ok, "moe_offload_serve_generated_tokens_total", "moe_offload_serve_first_token_seconds_count"]
    names += ["moe_offload_serve_token_seconds_count"]
    before = [sample(name) for name in names]
    post(served, SHORT)
    assert [sample(name) - b for name, b in zip(names, before, strict=True)] == [1, 2, 1, 1]
    ask(served, b"", method="GET", path="/some/secret/path")
    assert sample('moe_offload_serve_requests_total{path="other",status="404"}') >= 1
    assert sample("moe_offload_serve_waiting") == sample("moe_offload_serve_running") == 0
    stats = json.loads(ask(served, b"", method="GET", path="/v1/moe_offload/stats")[2])
    assert sample("moe_offload_hits_total") == stats["hits"] > 0 and 0 < stats["hit_rate"] < 1
