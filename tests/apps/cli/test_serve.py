"""serve and chat as a person starts and stops them: processes, signals, a terminal."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
import torch
from typer.testing import CliRunner

from moe_offload import Profile
from moe_offload.apps.cli import app
from moe_offload.apps.serving.cli import Stop
from moe_offload.apps.serving.server import listen

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "examples" / "polyglot-tiny")
GREEDY = {"generation_config": json.dumps({"do_sample": False, "max_new_tokens": 16})}
ITALIAN, JAPANESE = "Il comando ls elenca", "ls はディレクトリ"


@contextmanager
def started(*arguments: str, **streams) -> Iterator[subprocess.Popen]:
    """A process that does not outlive a failing test. One thread: cores shared with other tests make more a burden."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_offload", *arguments, "--budget", "6MB"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


class Serving:
    """`moe-offload serve` in a process of its own, from the line that scripts wait for."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        found = self.hear(rb"Serving (.+) on (http://127\.0\.0\.1:\d+/v1) ")
        self.name, url = found[1].decode(), found[2].decode()
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)

    def hear(self, pattern: bytes) -> re.Match[bytes]:
        """Wait for a line."""
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.match(pattern, line):
                return found
        raise AssertionError(b"".join(lines).decode())

    def begin_a_long_answer(self, model: str) -> None:
        options = {"max_tokens": 1900, "temperature": 0, "stream": True}
        self.answer = self.client.completions.create(model=model, prompt=ITALIAN, **options)
        next(self.answer)

    def ends(self) -> tuple[int, str]:
        """Its exit code, and what else it said."""
        said = self.process.communicate(timeout=120)[1].decode()
        return self.process.returncode, said


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with started("serve", MODEL, "--port", "0") as process:
        yield Serving(process)


@pytest.fixture(scope="module")
def said():
    """What `model.generate` of the resident model says next, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # as the processes have
    tokenizer, plain = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)

    def say(text: str) -> str:
        inputs = tokenizer(text, return_tensors="pt")
        out = plain.generate(**inputs, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return say


def complete(serving: Serving, prompt: str, **options) -> str:
    answer = serving.client.completions.create(model=MODEL, prompt=prompt, extra_body=GREEDY, **options)
    return "".join(part.choices[0].text for part in (answer if options else [answer]))


def chat(serving: Serving, text: str, **options) -> str:
    messages = [{"role": "user", "content": text}]
    answer = serving.client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=16, **options
    )
    if options:
        return "".join(part.choices[0].delta.content or "" for part in answer)
    return answer.choices[0].message.content


def test_a_real_client_gets_what_the_resident_model_says(serving, said) -> None:
    (listed,) = serving.client.models.list()
    assert listed.id == serving.name == MODEL
    assert complete(serving, ITALIAN) == complete(serving, ITALIAN, stream=True) == said(ITALIAN)
    assert chat(serving, ITALIAN) == chat(serving, ITALIAN, stream=True) == said(ITALIAN)
    with pytest.raises(openai.BadRequestError, match="pinned to"):
        serving.client.completions.create(model="gpt-4", prompt=ITALIAN)


def test_two_clients_at_once_each_get_their_own_answer(serving, said) -> None:
    asked = [
        (complete, ITALIAN, {}),
        (chat, JAPANESE, {"stream": True}),
        (chat, ITALIAN, {}),
        (complete, JAPANESE, {"stream": True}),
    ]
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(lambda one: one[0](serving, one[1], **one[2]), asked * 3))
    assert said(ITALIAN) != said(JAPANESE)
    assert answers == [said(ITALIAN), said(JAPANESE)] * 6


def test_sigterm_while_it_generates(tmp_path: Path) -> None:
    profile = tmp_path / "served.json"
    with started("serve", MODEL, "--port", "0", "--save-profile", str(profile), "--name", "tiny") as process:
        serving = Serving(process)
        serving.begin_a_long_answer("tiny")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="server is stopping"):  # after its ten seconds, not before
            for _ in serving.answer:
                pass
        code, said = serving.ends()
    assert code == 0, said
    assert "hit rate" in said and f"profile saved to {profile}" in said and "Traceback" not in said
    assert Profile.load(profile).tokens >= 9


def test_a_second_ctrl_c_does_not_wait_but_saves(tmp_path: Path) -> None:
    profile = tmp_path / "served.json"
    with started("serve", MODEL, "--port", "0", "--save-profile", str(profile)) as process:
        serving = Serving(process)
        serving.begin_a_long_answer(MODEL)
        process.send_signal(signal.SIGINT)
        serving.hear(b"moe-offload: stopping")
        process.send_signal(signal.SIGINT)
        code, said = serving.ends()
    assert code == 130 and "Traceback" not in said, said
    assert Profile.load(profile).tokens >= 9


@pytest.fixture
def environment(monkeypatch):
    """What chat changes of its process is put back."""
    from huggingface_hub import set_async_client_factory
    from huggingface_hub.utils._http import default_async_client_factory

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    yield monkeypatch
    set_async_client_factory(default_async_client_factory)


@pytest.mark.parametrize("command", ["serve", "chat"])
@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--budget", "much"], 2, "much"),
        (["--budget", "1MB"], 3, "floor"),
        (["--save-profile", "no/such/folder/p.json"], 2, "folder does not exist"),
        (["--profile", "nowhere.json"], 6, "nowhere.json"),
    ],
)
def test_what_cannot_work_is_one_line_and_a_code(command, flags, code, says) -> None:
    result = CliRunner().invoke(app, [command, MODEL, *(["--port", "0"] if command == "serve" else []), *flags])
    assert result.exit_code == code and says in result.stderr, result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("moe-offload:")]) == 1


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads one now has not looked at the flags first."""
    monkeypatch.setattr("moe_offload.api.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))


def test_a_port_in_use_is_noticed_before_the_model_is_loaded(no_model) -> None:
    with listen("127.0.0.1", 0) as taken:
        result = CliRunner().invoke(app, ["serve", MODEL, "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 7 and result.stderr.count("\n") == 1 and "in use" in result.stderr, result.output


@pytest.mark.parametrize(
    ("flags", "says"), [(["--host", "no-such-host.invalid"], "no-such-host"), (["--port", "65536"], "65536")]
)
def test_an_address_that_cannot_be(no_model, flags, says) -> None:
    result = CliRunner().invoke(app, ["serve", MODEL, *flags])
    assert result.exit_code == (7 if "--host" in flags else 2) and says in result.stderr, result.output


@pytest.mark.parametrize("command", ["serve"])
@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "openai", "jinja2", "rich"])
def test_a_package_that_is_not_installed(no_model, command, package, monkeypatch) -> None:
    real = importlib.import_module

    def import_module(name, *package_):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *package_)

    monkeypatch.setattr(importlib, "import_module", import_module)
    result = CliRunner().invoke(app, [command, MODEL])
    assert result.exit_code == 7 and result.stderr.count("\n") == 1, result.output
    assert package in result.stderr and 'pip install -e ".[serve]"' in result.stderr


def test_open_to_other_machines_is_said(monkeypatch) -> None:
    class Stopped(Stop):
        def __init__(self) -> None:
            super().__init__()
            self.asked.set()

    monkeypatch.setattr(sys.modules["moe_offload.apps.serving.cli"], "Stop", Stopped)
    result = CliRunner().invoke(app, ["serve", MODEL, "--budget", "6MB", "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 0 and "no authentication" in result.stderr, result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads(monkeypatch, number) -> None:
    monkeypatch.setattr("moe_offload.api.from_pretrained", lambda *_, **__: signal.raise_signal(number))
    result = CliRunner().invoke(app, ["serve", MODEL, "--port", "0"])
    assert (result.exit_code, result.stderr) == (130, "moe-offload: interrupted\n")


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_help(command) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "--budget" in result.stdout
