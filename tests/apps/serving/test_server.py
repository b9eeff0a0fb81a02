"""Addresses, and what clients are told by a server that stops."""

from __future__ import annotations

import socket
import threading

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
from transformers import AutoTokenizer

import moe_offload
from moe_offload.apps.serving import server as server_module
from moe_offload.apps.serving.app import App
from moe_offload.apps.serving.server import Server, open_listener
from moe_offload.errors import ServeError
from moe_offload.memory.stores.disk import DiskStore

from .conftest import MODEL, NAME, read_status, started, wait_until


def test_what_runs_and_what_waits_is_ended_when_its_time_is_over(slow, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 0.2)
    monkeypatch.setattr(server_module, "CANCEL_S", 5.0)
    failed: list[Exception] = []

    with started() as served:
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)
        options = {"model": NAME, "prompt": "Il comando", "max_tokens": 1900, "temperature": 0}

        def wait() -> None:
            try:
                client.completions.create(**options)
            except openai.APIStatusError as error:
                failed.append(error)

        running = client.completions.create(stream=True, **options)
        next(iter(running))
        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: len(served.app.queue) == 1)
        sending = socket.create_connection(served.server.address[:2])
        sending.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        wait_until(lambda: served.app._answering._bodies._held)
        served.server.stop()
        with sending:
            assert read_status(sending) == 503
        assert not served.server._thread.is_alive() and served.app.queue.join(120)
        with pytest.raises(openai.APIError, match="server is stopping: this request was not finished") as caught:
            list(running)
        assert (caught.value.type, caught.value.code) == ("server_error", "stopping")
        waiting.join(120)
        (error,) = failed
        assert error.status_code == 503 and "stopping" in error.message
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_what_fails_below_is_the_request_s_error_and_not_the_server_s_end(served, plain, monkeypatch) -> None:
    """Before anything is sent it has a status; in the midst of a stream it is an event."""
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)
    options = {"model": NAME, "prompt": "Il comando", "max_tokens": 200, "temperature": 0}
    with monkeypatch.context() as broken:
        stream = client.completions.create(stream=True, **options)
        next(iter(stream))

        def begin(self, layer, expert, row):
            raise moe_offload.ExpertReadError('the "disk" is\ngone')

        broken.setattr(DiskStore, "begin", begin)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert (caught.value.message, caught.value.type) == ('the "disk" is\ngone', "server_error")
        assert caught.value.code == "ExpertReadError"
        for streamed in (False, True):
            with pytest.raises(openai.InternalServerError, match="gone") as caught:
                client.completions.create(stream=streamed, **{**options, "prompt": "Qualcosa di nuovo"})
            assert (caught.value.status_code, caught.value.code) == (500, "ExpertReadError")
    answer = client.completions.create(**{**options, "max_tokens": 8})
    assert answer.choices[0].text == plain.say("Il comando")


def test_beams_are_not_served(monkeypatch) -> None:
    model = moe_offload.from_pretrained(MODEL, budget="6MB")
    model.generation_config.num_beams = 4
    with model.moe_offload as handle, pytest.raises(ServeError, match="num_beams"):
        App(handle, AutoTokenizer.from_pretrained(MODEL), NAME)


def test_a_port_that_cannot_be_had() -> None:
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"{port}.*in use"):
            open_listener("127.0.0.1", port)
    open_listener("127.0.0.1", port).close()  # at once again: no wait for the last connection to be forgotten
    with pytest.raises(ServeError, match="no-such-host"):
        open_listener("no-such-host.invalid", 0)
    with pytest.raises(ServeError, match="not an address of this machine"):
        open_listener("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("host", "url", "local"), [("localhost", "127.0.0.1", True), ("::1", "[::1]", True), ("0.0.0.0", "0.0.0.0", False)]
)
def test_where_it_is_reached(host, url, local) -> None:
    try:
        sock = open_listener(host, 0)
    except ServeError:
        pytest.skip(f"{host} is not to be had here")
    with sock:
        server = Server(app=None, sock=sock)  # type: ignore[arg-type]
        assert server.url == f"http://{url}:{sock.getsockname()[1]}/v1" and server.is_local is local
