"""The server in this process: the real openai client, faults below it, and what we rely on of transformers."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server

import moe_offload
from moe_offload.apps.serving import app as app_module
from moe_offload.apps.serving import server as server_module
from moe_offload.apps.serving.app import HANDLERS, build_app
from moe_offload.apps.serving.failures import told
from moe_offload.apps.serving.one_model import OneModel
from moe_offload.apps.serving.server import Server, listen
from moe_offload.errors import ServeError
from moe_offload.memory.stores.disk import DiskStore

MODEL = str(Path(__file__).parents[3] / "examples" / "polyglot-tiny")
NAME = "polyglot"
TEXT = "Il comando ls elenca"


@contextmanager
def serving(tokenizer=None):
    """A client of a server of its own for the bundled model in 6MB."""
    model = moe_offload.from_pretrained(MODEL, budget="6MB")
    with model.moe_offload as handle, listen("127.0.0.1", 0) as sock:
        server = Server(build_app(handle, tokenizer or AutoTokenizer.from_pretrained(MODEL), NAME), sock)
        server.start()
        try:
            yield openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120), server
        finally:
            server.app.state.model.cancel()
            server.stop()


@pytest.fixture(scope="module")
def client():
    with serving() as (client, _):
        yield client


def ask(client, **options):
    return client.completions.create(**{"model": NAME, "prompt": TEXT, "max_tokens": 8, "temperature": 0, **options})


def chat(client, *contents, **options):
    messages = [{"role": "user", "content": content} for content in contents]
    return client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0, **options)


def said(text, tokens=8):
    """What the resident model goes on to say."""
    tokenizer, plain = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    inputs = tokenizer(text, return_tensors="pt")
    out = plain.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_base_model_continues_the_messages_and_does_not_repeat_them(client) -> None:
    want = said(f"Pagina di manuale\n{TEXT}")
    assert chat(client, "Pagina di manuale", TEXT).choices[0].message.content == want
    parts = chat(client, "Pagina di manuale", TEXT, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == want


def test_its_own_chat_template_is_kept(caplog) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}<|im_start|>assistant{{ '\n' }}"
    )
    with caplog.at_level(logging.WARNING, "moe_offload"), serving(tokenizer) as (client, _):
        answer = chat(client, TEXT).choices[0].message.content
    assert answer == said(f"<|im_start|>{TEXT}<|im_start|>assistant\n").strip()
    assert not caplog.records


def test_responses_are_not_streamed_unless_asked(client) -> None:
    answer = client.responses.create(model=NAME, input=TEXT, max_output_tokens=8, temperature=0)
    assert answer.output_text == said(TEXT)


def test_stats_count_and_reset_takes_nothing_away(client) -> None:
    before = client.get("/moe_offload/stats", cast_to=dict)
    client.post("http://" + client.base_url.netloc.decode() + "/reset", cast_to=dict)
    ask(client)
    after = client.get("/moe_offload/stats", cast_to=dict)
    assert after["tokens"] > before["tokens"] and 0 < after["hit_rate"] < 1 and len(after["layers"]) == 4


def test_prometheus_sees_the_same_counters(client) -> None:
    ask(client)
    stats = client.get("/moe_offload/stats", cast_to=dict)
    text = client.get("http://" + client.base_url.netloc.decode() + "/metrics", cast_to=str)
    hits = next(line for line in text.splitlines() if line.startswith("moe_offload_hits_total"))
    assert float(hits.split()[-1]) == stats["hits"]


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        ({"model": "gpt-4"}, 400, NAME),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": "ls " * 3000}, 400, "the model takes 2048 at most"),
        ({"prompt": ["a", "b"]}, 400, "must be a string"),
        ({"max_tokens": 0}, 400, "max_new_tokens"),
        ({"extra_body": {"generation_config": "{"}}, 400, "Expecting"),
        ({"extra_body": {"generation_config": '{"do_sample": true}'}, "temperature": -1}, 400, "temperature"),
        ({"extra_body": {"nonsense": 1}}, 422, "nonsense"),
    ],
)
def test_what_cannot_be_answered_says_why(client, request_, status, says) -> None:
    with pytest.raises(openai.APIStatusError, match=says) as caught:
        ask(client, **request_)
    assert caught.value.status_code == status
    assert ask(client).choices[0].text == said(TEXT)


STREAMS = {
    "completions": lambda client, text: ask(client, prompt=text, stream=True),
    "chat": lambda client, text: chat(client, text, stream=True),
}


@pytest.mark.parametrize("answer", STREAMS.values(), ids=STREAMS)
def test_a_stream_that_cannot_begin_says_why(client, answer) -> None:
    with pytest.raises(openai.APIError, match="the model takes 2048 at most; shorten it") as caught:
        list(answer(client, "ls " * 3000))
    assert (caught.value.type, caught.value.code) == ("invalid_request_error", "400")


def test_an_error_that_says_nothing_is_an_error_all_the_same() -> None:
    async def events():
        yield 'data: {"text": "a"}\n\n'
        yield 'data: {"text": "\\"error\\""}\n\ndata: {"error": ""}\n\n'

    async def all_of_it() -> str:
        return "".join([event async for event in told(events())])

    first, second, failed = asyncio.run(all_of_it()).removesuffix("\n\n").split("\n\n")
    assert first == 'data: {"text": "a"}' and json.loads(second[6:]) == {"text": '"error"'}
    assert "log" in json.loads(failed[6:])["error"]["message"]


def test_other_kinds_of_models_are_not_served(client) -> None:
    with pytest.raises(openai.APIStatusError, match="writes text") as caught:
        client.audio.transcriptions.create(model=NAME, file=b"sound")
    assert caught.value.status_code == 501


def test_a_row_that_cannot_be_read_is_the_request_s_error_and_not_the_server_s_end(monkeypatch) -> None:
    with serving() as (client, _):
        want = ask(client).choices[0].text
        real = DiskStore.begin

        def broken(self, layer, expert, row):
            raise moe_offload.ExpertReadError('the "disk" is\ngone')

        monkeypatch.setattr(DiskStore, "begin", broken)
        with pytest.raises(openai.InternalServerError, match="gone") as caught:
            ask(client, prompt="Qualcosa di nuovo")
        assert caught.value.type == "ExpertReadError"
        for answer in STREAMS.values():
            with pytest.raises(openai.APIError) as caught:
                list(answer(client, "Qualcosa di nuovo"))
            assert (caught.value.message, caught.value.type) == ('the "disk" is\ngone', "ExpertReadError")
            assert caught.value.code == "500"
        *_, error, failed = client.responses.create(model=NAME, input="Qualcosa di nuovo", stream=True)
        assert (error.type, error.message) == ("error", 'the "disk" is\ngone')
        assert (failed.type, failed.response.error.message) == ("response.failed", 'the "disk" is\ngone')
        monkeypatch.setattr(DiskStore, "begin", real)
        assert ask(client).choices[0].text == want == said(TEXT)


def test_what_runs_and_what_waits_is_cancelled_when_its_time_is_over(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 0.2)
    monkeypatch.setattr(server_module, "CANCEL_S", 60.0)  # what is cancelled may be compiling, on a busy machine
    failed: list[Exception] = []

    def wait() -> None:
        try:
            ask(client, max_tokens=1500)
        except openai.APIStatusError as error:
            failed.append(error)

    with serving() as (client, server):
        running = ask(client, max_tokens=1500, stream=True)
        next(iter(running))
        waiting = threading.Thread(target=wait)
        waiting.start()
        while len(server._uvicorn.server_state.tasks) < 2:
            time.sleep(0.01)
        server.stop()
        assert not server._thread.is_alive()
        with pytest.raises(openai.APIError, match="server is stopping: this request was not finished") as caught:
            list(running)
        assert (caught.value.type, caught.value.code) == ("ClosedError", "503")
        waiting.join(30)
        (error,) = failed
        assert error.status_code == 503 and "stopping" in error.message
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_a_port_that_cannot_be_had() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"{port}.*in use"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()  # at once again: no wait for the last connection to be forgotten
    with pytest.raises(ServeError, match="no-such-host"):
        listen("no-such-host.invalid", 0)
    with pytest.raises(ServeError, match="not an address of this machine"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("host", "url", "local"), [("localhost", "127.0.0.1", True), ("::1", "[::1]", True), ("0.0.0.0", "0.0.0.0", False)]
)
def test_where_it_is_reached(host, url, local) -> None:
    try:
        sock = listen(host, 0)
    except ServeError:
        pytest.skip(f"{host} is not to be had here")
    with sock:
        server = Server(app=None, sock=sock)  # type: ignore[arg-type]
        assert server.url == f"http://{url}:{sock.getsockname()[1]}/v1" and server.is_local is local


def test_what_we_rely_on_of_transformers() -> None:
    """Fails when a minor moves what serving/ takes from transformers/cli/serving."""
    parameters = inspect.signature(build_server).parameters
    ours = {"model_manager", "generation_state", *HANDLERS}
    assert ours <= set(parameters)
    assert all(
        name.endswith("_handler") or p.default is not p.empty for name, p in parameters.items() if name not in ours
    )
    for handler in HANDLERS.values():
        assert {"model_manager", "generation_state"} <= set(inspect.signature(handler.__init__).parameters)
    for name, member in vars(OneModel).items():
        if callable(getattr(OneModel, name)) and not name.startswith("__"):
            theirs = getattr(ModelManager, name)  # nothing is overridden that is not there
            named = {p.name for p in inspect.signature(getattr(member, "__func__", member)).parameters.values()}
            kinds = {p.kind for p in inspect.signature(getattr(member, "__func__", member)).parameters.values()}
            takes_all = inspect.Parameter.VAR_KEYWORD in kinds
            assert takes_all or set(inspect.signature(theirs).parameters) <= named | {"self"}


def test_a_new_kind_of_handler_is_answered_for(monkeypatch) -> None:
    """5.17 has no System One handler, 5.23 has; the next may have another."""
    seen = {}

    def newer(model_manager, chat_handler, completion_handler, response_handler, dream_handler, generation_state):
        seen["dream"] = dream_handler
        return build_server(model_manager, chat_handler, completion_handler, response_handler, *rest, generation_state)

    rest = [app_module.NotServed() for name in inspect.signature(build_server).parameters if name.endswith("_handler")][
        3:
    ]
    monkeypatch.setattr(app_module, "build_server", newer)
    model = moe_offload.from_pretrained(MODEL, budget="6MB")
    with model.moe_offload as handle:
        build_app(handle, AutoTokenizer.from_pretrained(MODEL), NAME)
    assert isinstance(seen["dream"], app_module.NotServed)


def test_the_chat_s_question_whether_the_model_is_there(client) -> None:
    for name, status in ((NAME, "ready"), ("other", "error")):
        body = json.dumps({"model": name}).encode()
        with socket.create_connection((client.base_url.host, client.base_url.port)) as sock:
            sock.sendall(
                b"POST /load_model HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            answer = b"".join(iter(lambda s=sock: s.recv(4096), b"")).decode()
        assert f'"status": "{status}"' in answer, answer
