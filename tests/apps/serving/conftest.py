"""One server of the bundled model in this process, for all tests of a file: compiling it takes seconds."""

from __future__ import annotations

import http.client
import socket
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")

from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_offload
from moe_offload.apps.prompt_cache.cache import PromptCache
from moe_offload.apps.serving.app import App
from moe_offload.apps.serving.generation import generate_answer
from moe_offload.apps.serving.queue import Job
from moe_offload.apps.serving.server import Server, open_listener
from tests.paths import MODEL_NAME as MODEL

NAME = "polyglot"


@contextmanager
def started(tokenizer=None, keep=False, **options):
    """A server of its own: `url`, `app`, `server`, and the offloaded `model`. It may `keep` what it reads."""
    model = moe_offload.from_pretrained(MODEL, budget="6MB")
    if keep:
        known = PromptCache(model, tokens=300)
        options |= {"known": known, "generate": partial(generate_answer, generate=known.generate)}
    with model.moe_offload as handle, open_listener("127.0.0.1", 0) as sock:
        app = App(handle, tokenizer or AutoTokenizer.from_pretrained(MODEL), NAME, **options)
        server = Server(app, sock)
        server.start()
        try:
            yield SimpleNamespace(url=server.url, app=app, server=server, model=model, handle=handle)
        finally:
            app.close()
            server.stop()


@pytest.fixture(scope="package")
def served():
    with started() as found:
        yield found


@pytest.fixture
def slow(monkeypatch) -> None:
    """Each token takes a while, so that a long answer is not done, however fast the machine, when a test asks."""
    monkeypatch.setattr(Job, "gone", lambda job: job._gone.wait(0.02))


@pytest.fixture(scope="package")
def plain():
    """The resident model and its tokenizer, and what it goes on to say greedily."""
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)

    def say(text: str, tokens: int = 8) -> str:
        inputs = tokenizer(text, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return SimpleNamespace(model=model, tokenizer=tokenizer, say=say)


def read_status(sock: socket.socket) -> int:
    """The status of one answer, which is read to its end: what follows on the connection is the next one."""
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    answer.read()
    return answer.status


def wait_until(condition) -> None:
    while not condition():
        time.sleep(0.005)
