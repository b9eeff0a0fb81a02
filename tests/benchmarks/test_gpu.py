"""benchmarks/gpu.py without a GPU: parts that fail, hang or are not there, and files with the right names."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from moe_offload.apps.cli import app

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu")


def part(gpu, program, limit_s=60.0, **given):
    return gpu.Part("checks", program, [sys.executable, "-S", "-u", "-c", program], limit_s, **given)


def started(gpu, monkeypatch, out, parts, *arguments):
    monkeypatch.setattr(gpu, "parts", lambda *_: parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    return gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_is_one_line():
    done = subprocess.run([sys.executable, SCRIPTS / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("no CUDA device: all of this needs one")


def test_what_was_found_is_kept_when_it_is_stopped(gpu, monkeypatch, tmp_path):
    kept = []
    bench = SimpleNamespace(keep=lambda *given: kept.append(given), model="tiny")
    monkeypatch.setattr(gpu, "run", lambda *_: sys.exit(143))
    with pytest.raises(SystemExit):
        gpu.run_all([part(gpu, "", bench=bench)], tmp_path, tmp_path / "cache", io.StringIO())
    ((out, cache, _, complete),) = kept
    assert (out, cache, complete) == (tmp_path, tmp_path / "cache", False)


def start_limits_with(marker, monkeypatch):
    """The time limit of a part counts from when the file `marker` is there: to start Python may take a while."""
    wait = subprocess.Popen.wait

    def wait_from_then_on(process, timeout=None):
        while timeout is not None and not marker.exists() and process.poll() is None:
            time.sleep(0.01)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_from_then_on)


def test_each_part_runs_whatever_the_others_do(gpu, monkeypatch, tmp_path, capsys):
    marker = tmp_path / "begun"
    start_limits_with(marker, monkeypatch)
    hangs = f"import time, pathlib; print('begun'); pathlib.Path({str(marker)!r}).touch(); time.sleep(600)"
    made = [
        gpu.Part("checks", "absent", ["no-such-program"], 60),
        part(gpu, hangs, limit_s=1.0),
        part(gpu, "raise SystemExit('broken')"),
        part(gpu, "print('fine')"),
    ]
    assert started(gpu, monkeypatch, tmp_path / "out", made) == 1
    log = (tmp_path / "out" / "gpu.txt").read_text()
    assert log.endswith(capsys.readouterr().out)
    first, absent, hung, broken, fine = log.splitlines()[:5]
    assert (
        first == "1 of 4 parts passed"
        and broken.startswith("FAILED")
        and fine.startswith("passed print('fine'): line ")
    )
    assert absent.startswith("FAILED absent") and hung.startswith("FAILED import time")
    assert log.splitlines()[int(fine.rpartition(" ")[2]) - 1].startswith("== print('fine') (")
    for words in ("cannot be started", "begun", "stopped after its 1 s", "broken", "fine"):
        assert words in log
    assert f"failed: absent, {hangs}, raise SystemExit('broken')\n" in log


def test_parts_are_chosen_by_group_or_by_name(gpu, monkeypatch, tmp_path):
    """And what was printed by others, before, stays."""
    names = [("a", "b"), ("a", "c"), ("d", "e"), ("d", "f")]
    made = [gpu.Part(group, name, ["echo", f"this is {name}"], 60) for group, name in names]
    for asked in ("a", "e"):
        assert started(gpu, monkeypatch, tmp_path, made, "--only", asked) == 0
    lines = (tmp_path / "gpu.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("this")] == ["this is b", "this is c", "this is e"]


def test_what_a_part_started_ends_with_it(gpu, monkeypatch, tmp_path):
    beat = tmp_path / "beat"
    start_limits_with(beat, monkeypatch)
    inner = f"import time, pathlib\nwhile True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.05)"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {inner!r}]).wait()"
    assert not gpu.run(part(gpu, outer, limit_s=0.2), io.StringIO())
    assert beat.exists()
    beat.unlink()
    time.sleep(0.5)
    assert not beat.exists()


def test_a_checkpoint_stays_for_the_next_bench_of_its_model_and_no_longer(gpu, tmp_path):
    seen = []

    def bench(model):
        folder = tmp_path / model
        keep = lambda *_: seen.append(sorted(path.name for path in tmp_path.iterdir()))  # noqa: E731
        made = SimpleNamespace(model=model, checkpoints=lambda cache: folder, keep=keep)
        return part(gpu, f"import os; os.makedirs({str(folder)!r}, exist_ok=True)", bench=made)

    assert not gpu.run_all([bench("one"), bench("one"), bench("other")], tmp_path, tmp_path, io.StringIO())
    assert seen == [["one"], ["one"], ["other"]] and not list(tmp_path.iterdir())


def benches(gpu, *arguments):
    return [one for one in gpu.parts(*arguments) if one.group == "bench"]


def test_the_benches_replay_traces_where_there_are_any(gpu, tmp_path):
    assert sum(one.limit_s for one in benches(gpu, tmp_path, None, False)) <= 720
    for one in benches(gpu, tmp_path, None, False):
        assert "--layers" in one.command and "--routing" not in one.command
    (tmp_path / "qwen3-30b-a3b_k6_bigmoeonedge.npz").touch()
    whole, peak, other = benches(gpu, tmp_path, tmp_path, True)
    for one in (whole, peak):
        assert "--layers" not in one.command and one.command[one.command.index("--routing") + 1].endswith("ge.npz")
    assert "--routing" not in other.command
    assert peak.command[peak.command.index("--new-tokens") + 1] == "1000"
    assert len({one.command[-1] for one in (whole, peak, other)}) == 3


def test_the_command_lines_of_the_benches_are_right(gpu, tmp_path):
    """As typer reads them: they get as far as looking for a GPU, or for what they are to measure."""
    for one in benches(gpu, tmp_path, None, False):
        done = CliRunner().invoke(app, [*one.command[3:], "--layers", "999"])
        assert done.exit_code == 2
        assert "--device cuda" in done.output or "layers" in done.output, done.output


def test_what_was_found_becomes_a_dated_file(gpu, monkeypatch, tmp_path):
    one = benches(gpu, tmp_path, None, False)[0]
    keep = lambda complete: one.bench.keep(tmp_path, tmp_path, one.command, complete)  # noqa: E731
    assert keep(False) is None
    result = {"model": "checkpoints/qwen3_12-layers", "date": "2026-11-26", "machine": {"gpu": "NVIDIA H100 80GB HBM3"}}
    one.bench.found(tmp_path).write_text(json.dumps(result))
    monkeypatch.setattr("moe_offload.apps.bench.table.format_table", lambda result: "the table")
    file = keep(False)
    assert file.name == "qwen3-30b-a3b_h100-80gb-hbm3_2026-11.md"
    text = file.read_text()
    assert text.startswith("# qwen3_12-layers, random weights: NVIDIA H100 80GB HBM3, 2026-11-26\n")
    assert "$ moe-offload bench synthetic:qwen3-30b-a3b --device cuda --layers 12" in text
    assert "cut short" in text and "the table" in text and str(tmp_path) not in text
    assert json.loads(file.with_suffix(".json").read_text()) == result
    assert "cut short" not in keep(True).read_text()
