"""benchmarks/gpu.py without a GPU: parts that fail, hang or are not there, and files with the right names."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def part(gpu, program, limit_s=60.0, group="checks"):
    return gpu.Part(group, program, [sys.executable, "-u", "-c", program], limit_s)


def test_each_part_runs_whatever_the_others_do(gpu, monkeypatch, tmp_path, capsys):
    hangs = "import time; print('begun'); time.sleep(600)"
    made = [
        gpu.Part("machine", "absent", ["no-such-program"], 60),
        part(gpu, hangs, limit_s=2.0),
        part(gpu, "raise SystemExit('broken')"),
        part(gpu, "print('fine')"),
    ]
    monkeypatch.setattr(gpu, "parts", lambda *_: made)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main() == 1
    log = (tmp_path / "out" / "gpu.txt").read_text()
    assert log == capsys.readouterr().out
    for words in ("cannot be started", "begun", "stopped after its 2 s", "broken", "fine"):
        assert words in log
    assert f"failed: absent, {hangs}, raise SystemExit('broken')\n" in log


def test_what_a_part_started_ends_with_it(gpu, tmp_path):
    beat = tmp_path / "beat"
    inner = f"import time, pathlib\nwhile True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.05)"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]).wait()"
    assert not gpu.run(part(gpu, outer, limit_s=4.0), io.StringIO())
    assert beat.exists()
    beat.unlink()
    time.sleep(0.5)
    assert not beat.exists()


def test_the_benches_fit_ten_minutes_and_replay_traces_where_there_are_any(gpu, tmp_path):
    benches = [one for one in gpu.parts(tmp_path, None, False) if one.group == "bench"]
    assert sum(one.limit_s for one in benches) <= 600
    assert all("--layers" in one.command and "--routing" not in one.command for one in benches)
    (tmp_path / gpu.MODELS[0].trace).touch()
    whole, other = [one for one in gpu.parts(tmp_path, tmp_path, True) if one.group == "bench"]
    assert "--layers" not in whole.command and str(tmp_path / gpu.MODELS[0].trace) in whole.command
    assert "--routing" not in other.command


def test_the_command_line_of_a_bench_is_one(gpu, tmp_path):
    """As typer reads it: it gets as far as looking for a GPU, or for what it is to measure."""
    from typer.testing import CliRunner

    from moe_offload.cli import app

    (one, _) = (one for one in gpu.parts(tmp_path, None, False) if one.group == "bench")
    done = CliRunner().invoke(app, [*one.command[3:], "--layers", "999"])
    assert done.exit_code == 2
    assert "--device cuda" in done.output or "1 to 48 layers" in done.output, done.output


def test_what_was_found_becomes_a_dated_file(gpu, monkeypatch, tmp_path):
    bench = next(one for one in gpu.parts(tmp_path, None, False) if one.group == "bench")
    assert gpu.keep(tmp_path, tmp_path, bench, False) is None
    result = {"model": "/tmp/x/qwen3_12-layers", "date": "2026-11-26", "machine": {"gpu": "NVIDIA H100 80GB HBM3"}}
    gpu.result_file(tmp_path, bench.name).write_text(json.dumps(result))
    monkeypatch.setattr("moe_offload.bench.table.table", lambda result: "the table")
    file = gpu.keep(tmp_path, tmp_path, bench, False)
    assert file.name == "qwen3-30b-a3b_h100-80gb-hbm3_2026-11.md"
    text = file.read_text()
    assert text.startswith("# qwen3_12-layers, random weights: NVIDIA H100 80GB HBM3, 2026-11-26\n")
    assert "$ moe-offload bench synthetic:qwen3-30b-a3b --device cuda --layers 12" in text
    assert "cut short" in text and "the table" in text and str(tmp_path) not in text
    assert json.loads(file.with_suffix(".json").read_text()) == result
    assert "cut short" not in gpu.keep(tmp_path, tmp_path, bench, True).read_text()
