"""serve as a person starts and stops it: processes, signals, and what is refused before a model is loaded."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
from typer.testing import CliRunner

from moe_offload import Profile
from moe_offload.apps.cli import app
from moe_offload.apps.options.signals import Stop
from moe_offload.apps.serving.server import open_listener
from tests.paths import MODEL_NAME as MODEL
from tests.paths import ROOT

TEXT = "Il comando ls elenca"
#: The command line with answers that take long, however fast the machine, and with so much time for them to end.
SLOW = """
from moe_offload.apps.serving import queue, server
queue.Job.gone, server.GRACE_S = lambda job: job._gone.wait(0.02), {grace_s}
from moe_offload.apps.cli import main
main()
"""


@contextmanager
def started(*arguments: str, grace_s: float | None = None) -> Iterator[subprocess.Popen]:
    """A process that does not outlive a failing test. One thread: cores shared with other tests make more a burden."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        *(["-c", SLOW.format(grace_s=grace_s)] if grace_s else ["-m", "moe_offload"]),
        *arguments,
        "--budget",
        "6MB",
    ]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
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
            self.before = b"".join(lines).decode()
            if found := re.match(pattern, line):
                return found
        raise AssertionError(self.before)

    def begin_a_long_answer(self, model: str) -> None:
        options = {"max_tokens": 1900, "temperature": 0, "stream": True}
        self.answer = self.client.completions.create(model=model, prompt=TEXT, **options)
        next(self.answer)

    def ends(self) -> tuple[int, str]:
        """Its exit code, and what else it said."""
        said = self.process.communicate(timeout=120)[1].decode()
        return self.process.returncode, said


def test_a_key_and_ctrl_c_while_nothing_runs(tmp_path: Path, monkeypatch) -> None:
    """No request waits for a graph: all are compiled before the line that scripts wait for."""
    monkeypatch.setenv("MOE_OFFLOAD_API_KEY", "s3cret")
    profile = tmp_path / "served.json"
    with started("serve", MODEL, "--port", "0", "--save-profile", str(profile)) as process:
        serving = Serving(process)
        (listed,) = serving.client.with_options(api_key="s3cret").models.list()
        assert listed.id == serving.name == MODEL
        graphs = serving.client.with_options(api_key="s3cret").get("/moe_offload/stats", cast_to=dict)["graphs"]
        for prompt in (TEXT, [5]):  # several tokens, and one
            options = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0.7, "seed": 1}
            serving.client.with_options(api_key="s3cret").completions.create(**options)
        after = serving.client.with_options(api_key="s3cret").get("/moe_offload/stats", cast_to=dict)["graphs"]
        assert graphs == after >= 2
        with pytest.raises(openai.AuthenticationError):
            serving.client.models.list()
        process.send_signal(signal.SIGINT)
        code, said = serving.ends()
    assert code == 0 and "Traceback" not in said and "s3cret" not in said, said
    assert " GET /v1/models 401\n" in said and " POST /v1/completions 200 prompt_tokens=" in said
    assert re.search(r"Compiled and warmed up in \d+\.\d s", serving.before)
    assert Profile.load(profile).tokens >= 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_compiles(number) -> None:
    with started("serve", MODEL, "--port", "0") as process:
        while b"no chat template" not in process.stderr.readline():
            pass
        process.send_signal(number)
        said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130 and said.splitlines()[-1].endswith("moe-offload: interrupted"), said
    assert "Traceback" not in said


def test_sigterm_while_it_generates(tmp_path: Path) -> None:
    profile = tmp_path / "served.json"
    arguments = ["--port", "0", "--save-profile", str(profile), "--served-model-name", "tiny"]
    with started("serve", MODEL, *arguments, grace_s=0.5) as process:
        serving = Serving(process)
        serving.begin_a_long_answer("tiny")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="server is stopping"):  # after its time, not before
            for _ in serving.answer:
                pass
        code, said = serving.ends()
    assert code == 0, said
    assert "hit rate" in said and f"profile saved to {profile}" in said and "Traceback" not in said
    assert Profile.load(profile).tokens >= 9


def test_a_second_ctrl_c_does_not_wait_but_saves(tmp_path: Path) -> None:
    profile = tmp_path / "served.json"
    with started("serve", MODEL, "--port", "0", "--save-profile", str(profile), grace_s=3600) as process:
        serving = Serving(process)
        serving.begin_a_long_answer(MODEL)
        process.send_signal(signal.SIGINT)
        serving.hear(b"moe-offload: stopping")
        process.send_signal(signal.SIGINT)
        code, said = serving.ends()
    assert code == 130 and "Traceback" not in said, said
    assert Profile.load(profile).tokens >= 9


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
    with open_listener("127.0.0.1", 0) as taken:
        result = CliRunner().invoke(app, ["serve", MODEL, "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 7 and result.stderr.count("\n") == 1 and "in use" in result.stderr, result.output


def test_a_port_in_use_is_noticed_before_torch_is_imported() -> None:
    script = "import sys; sys.modules['torch'] = None; from moe_offload.apps.cli import main; main()"
    with open_listener("127.0.0.1", 0) as taken:
        command = [sys.executable, "-c", script, "serve", MODEL, "--port", str(taken.getsockname()[1])]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 7 and "in use" in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    ("flags", "says"), [(["--host", "no-such-host.invalid"], "no-such-host"), (["--port", "65536"], "65536")]
)
def test_an_address_that_cannot_be(no_model, flags, says) -> None:
    result = CliRunner().invoke(app, ["serve", MODEL, *flags])
    assert result.exit_code == (7 if "--host" in flags else 2) and says in result.stderr, result.output


@pytest.mark.parametrize("command", ["serve"])
@pytest.mark.parametrize("package", ["starlette", "uvicorn", "jinja2"])
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
    assert result.exit_code == 0 and "--api-key" in result.stderr, result.output


@pytest.mark.parametrize("given", [["--api-key", ""], ["--api-key", " key"], []])
def test_a_key_that_is_empty_does_not_open_the_server(given, no_model, monkeypatch) -> None:
    monkeypatch.setenv("MOE_OFFLOAD_API_KEY", "")
    result = CliRunner().invoke(app, ["serve", MODEL, "--port", "0", *given])
    assert result.exit_code == 2 and "MOE_OFFLOAD_API_KEY: a key is" in result.stderr, result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads(monkeypatch, number) -> None:
    monkeypatch.setattr("moe_offload.api.from_pretrained", lambda *_, **__: signal.raise_signal(number))
    result = CliRunner().invoke(app, ["serve", MODEL, "--port", "0"])
    assert (result.exit_code, result.stderr) == (130, "moe-offload: interrupted\n")


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_help(command) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "--budget" in result.stdout
