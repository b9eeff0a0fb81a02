"""moe-offload top against real processes that generate, and the screen it draws."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.live.client import find_running
from moe_offload.apps.live.rates import rates_between
from moe_offload.apps.live.screen import draw_screen, sparkline
from moe_offload.observe.live.folder import make_private
from moe_offload.observe.live.snapshot import Snapshot
from tests.fakes.watched import ROOT, models, use_folder
from tests.paths import MODEL_NAME as MODEL

pytestmark = pytest.mark.timeout(900)  # models are made, traced and looked at a dozen times
PATIENT_S = 100.0  # on a busy machine a model may take longer to answer than a user would wait
TOP = f"""
import sys
from moe_offload.apps.live import client
client.ANSWER_S = {PATIENT_S}
from moe_offload.apps.cli import app
app(["top", *sys.argv[1:]])
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr("moe_offload.apps.live.client.ANSWER_S", PATIENT_S)


@pytest.fixture
def folder(monkeypatch):
    made = Path(tempfile.mkdtemp(prefix="m-"))
    yield use_folder(monkeypatch, made)
    shutil.rmtree(made)


def run(*arguments: str):
    return CliRunner().invoke(app, ["top", *arguments])


def watch(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", TOP, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the suite in the background lets it ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_no_running_model_is_one_line_that_says_how(folder):
    result = run("--once")
    assert result.exit_code == 7 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "MOE_OFFLOAD_LIVE=1" in line and "serve_live()" in line


def test_one_that_is_too_busy_to_answer_is_not_said_to_be_absent(folder, monkeypatch):
    monkeypatch.setattr("moe_offload.apps.live.client.ANSWER_S", 0.2)
    make_private(folder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(folder / f"{os.getpid()}.sock"))
        silent.listen()
        result = run("--once")
    assert result.exit_code == 7 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert f"{os.getpid()}: no answer" in line


@pytest.mark.long
def test_one_that_is_closed_while_it_is_watched(folder):
    with models(1) as (child,):
        result = run("--once", "--json")
        assert result.exit_code == 0, result.output
        first = json.loads(result.stdout)
        assert first["pid"] == child.pid and first["tokens"] >= 31 and first["graphs"] and len(first["layers"]) == 2
        assert first["hits"] and first["misses"] and first["bytes_read"]

        table = run(str(child.pid), "--once")
        assert table.exit_code == 0 and "\x1b" not in table.stdout, table.output
        assert f"process {child.pid}" in table.stdout and "hit rate" in table.stdout

        looking = watch("--json", "--interval", "0.1")
        seen = [json.loads(looking.stdout.readline()) for _ in range(3)]
        assert seen[0]["uptime_s"] < seen[1]["uptime_s"] < seen[2]["uptime_s"]
        child.stdin.write("close\n")
        child.stdin.flush()
        assert child.stdout.readline() == "closed\n"
        _, said = looking.communicate(timeout=300)
        assert looking.returncode == 0 and f"{child.pid}: the model was closed" in said, said


def test_two_processes_of_which_one_dies(folder):
    with models(2) as (one, two):
        several = run("--once")
        assert several.exit_code == 2 and several.stdout == ""
        (line,) = several.stderr.splitlines()
        assert str(one.pid) in line and str(two.pid) in line
        absent = run("1", "--once")
        assert absent.exit_code == 7 and str(one.pid) in absent.stderr
        for child in (one, two):
            assert json.loads(run(str(child.pid), "--once", "--json").stdout)["pid"] == child.pid

        looking = watch(str(one.pid), "--interval", "0.1")
        assert any("tokens/s" in line for line in looking.stdout), "it ended before it had two looks"
        one.kill()
        one.wait()
        _, said = looking.communicate(timeout=300)
        assert looking.returncode == 0 and f"{one.pid}: the process has ended" in said, said

        assert json.loads(run("--once", "--json").stdout)["pid"] == two.pid, "the only one left needs no name"
        assert [path.stem for path in folder.iterdir()] == [str(two.pid)], "the socket of a dead process is removed"

        looking = watch("--interval", "0.1")
        looking.stdout.readline()
        looking.send_signal(signal.SIGINT)
        _, said = looking.communicate(timeout=300)
        assert (looking.returncode, said) == (0, ""), said


@pytest.mark.parametrize(
    ("variable", "flags", "watched"), [("", [], True), ("0", [], False), ("1", [], True), ("1", ["--no-live"], False)]
)
def test_run_can_be_watched_unless_a_setting_says_no(folder, monkeypatch, variable, flags, watched):
    command = importlib.import_module("moe_offload.apps.generate.run")
    seen = []
    monkeypatch.setattr(command, "generate_into", lambda *_: seen.extend(find_running()))
    monkeypatch.setenv("MOE_OFFLOAD_LIVE", variable)
    result = CliRunner().invoke(app, ["run", MODEL, "--budget", "6MB", *flags])
    assert result.exit_code == 0, result.output
    assert [found.pid for _, found in seen] == [os.getpid()] * watched


@pytest.mark.parametrize("arguments", [["--interval", "0"], ["--interval", "much"], ["--no-such-flag"], ["1", "2"]])
def test_a_wrong_flag_is_exit_code_2(folder, arguments):
    assert run(*arguments).exit_code == 2


def test_a_process_is_a_number(folder):
    result = run("python")
    assert result.exit_code == 2 and "'python' is no process" in result.stderr


def test_it_needs_no_torch(folder):
    program = (
        "import sys\nfrom moe_offload.apps.cli import app\n"
        "try:\n    app(['top'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'moe_offload.apps.live.client' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def look(seconds: float, tokens: int, hits: int, misses: int, stall_s: float, layers: int = 2) -> Snapshot:
    asked = {"tokens": tokens, "hits": hits, "misses": misses, "stall_s": stall_s, "bytes_read": misses * 1000}
    layer = {"name": "l", "experts": 8, "slots": 4, "resident": 3, "row_bytes": 1000, **asked}
    facts = {
        **{"format": "moe_offload.live", "version": 1, "model": "org/[red]name\x1b[2J", "pid": 7, "uptime_s": seconds},
        **{"budget_bytes": 10**9, "plan": {"slots": 10**9}, "rss_bytes": 2 * 10**9, "graphs": 2, "queued": 3},
        **{"reading": 4, "layers": [layer] * layers, **asked},
    }
    return Snapshot.of(json.dumps(facts).encode())


def drawn(
    now: Snapshot,
    before: Snapshot | None = None,
    height: int = 1000,
    speeds: tuple[float, ...] = (),
    width: int = 120,
) -> str:
    out = io.StringIO()
    rates = None if before is None else rates_between(before, now)
    Console(file=out, width=width, markup=False).print(draw_screen(now, rates, speeds, height))
    return out.getvalue()


def test_rates_are_of_the_time_between_two_looks():
    rates = rates_between(look(10.0, 100, 60, 40, 1.0), look(12.0, 110, 66, 44, 1.5))
    assert (rates.tokens_per_s, rates.bytes_per_s, rates.stall_share) == (5.0, 2000.0, 0.25)
    assert rates.hit_rate == 0.6 and rates.hit_rates == [0.6, 0.6]
    idle = rates_between(look(10.0, 100, 60, 40, 1.0), look(12.0, 100, 60, 40, 1.0))
    assert (idle.tokens_per_s, idle.hit_rate) == (0.0, None)
    assert rates_between(look(12.0, 100, 60, 40, 1.0), look(12.0, 100, 60, 40, 1.0)) is None


def test_the_screen_shows_what_is_now_and_what_was():
    text = drawn(look(12.0, 110, 66, 44, 1.5), look(10.0, 100, 63, 37, 1.0), speeds=(1.0, 5.0))
    for words in ("5.0 tokens/s", "30.0% now, 60.0% overall", "3.50 KB/s", "25.0% of the time", "3 rows queued", "3/4"):
        assert words in text, text
    assert "\x1b" not in text and "org/[red]name" in text, "a name steers no terminal"
    assert "tokens/s" not in drawn(look(12.0, 110, 66, 44, 1.5))


def test_a_narrow_screen_keeps_labels_and_figures():
    text = drawn(look(12.0, 110, 66, 44, 1.5), width=70)
    for words in ("hit rate", "60.0% overall", "waiting", "1.5 s in all", "budget", "memory"):
        assert words in text, text


def test_many_layers_stand_side_by_side():
    text = drawn(look(12.0, 110, 66, 44, 1.5, layers=48), look(10.0, 100, 63, 37, 1.0, layers=48), height=30)
    assert len(text.splitlines()) <= 30 and " 47 " in text


def test_sparkline():
    assert sparkline([0, 1, 2]) == "▁▄█" and sparkline([]) == "" == sparkline([0.0, 0.0])
