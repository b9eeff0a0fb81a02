"""The one command for a GPU: what it would run, what it makes of the results, and what it does when a part hangs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from moe_offload.cli import app

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu")


def test_what_is_run(gpu, tmp_path):
    (tmp_path / "qwen3-30b-a3b_k6_bigmoeonedge.npz").touch()
    found = list(gpu.gpu_bench.commands(tmp_path / "out", [tmp_path / "absent", tmp_path]).values())
    asked = [(c[4], c[c.index("--residency") + 1]) for c in found]
    qwen, gpt = "synthetic:qwen3-30b-a3b", "synthetic:gpt-oss-20b"
    assert sorted(asked) == sorted([(qwen, f"{s}%") for s in (10, 25, 50, 100)] + [(gpt, f"{s}%") for s in (25, 50)])
    assert all(c[c.index("--device") + 1] == "cuda" for c in found)
    assert [("--routing" in c) for c in found] == [qwen in c for c in found]  # the other trace is not there
    assert len({c[-1] for c in found}) == 6 and found[0][-1] == str(tmp_path / "out/bench_qwen3-30b-a3b_50.json")


def test_the_bench_takes_these_flags(gpu, tmp_path):
    """Everything but the run itself: flags are parsed, and answered with that there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command in gpu.gpu_bench.commands(tmp_path, []).values():
        done = CliRunner().invoke(app, command[3:])
        assert done.exit_code == 2 and "finds no CUDA device" in " ".join(done.output.split()), done.output


def result(residency, **changed):
    rows = [
        {"side": "resident", "failed": "", "tokens_per_s": 200.0},
        {"side": "ours", "failed": "", "tokens_per_s": 150.0, "hit_rate": 0.9, "peak_bytes": 4_000_000_000},
        {"side": "accelerate", "failed": "out of memory"},
    ]
    ratios = {"share_of_resident_speed": 0.75, "decode_over_roof": 1.25, "miss_traffic_over_link": 0.8}
    ratios |= {"prefill_over_roof": 2.0, "speedup_over_ours_host": None, "speedup_over_accelerate_cpu": None}
    machine = {"gpu": "H", "cpu": "C", "cores": 16, "torch": "2", "transformers": "5"}
    return {
        "model": "/cache/qwen3-30b-a3b_6-layers", "date": "2026-11-26", "machine": machine, "requests": 3,
        "prompt_tokens": 512, "new_tokens": 128, "residency": residency, "budget_bytes": 5_000_000_000, "rows": rows,
        "ratios": ratios, "roofs": {"copy_engine_bytes_per_s": 55e9, "kernel_bytes_per_s": 50e9}, "routing": "a trace",
        "tokens_differ": [], **changed,
    }  # fmt: skip


def test_the_table(gpu, tmp_path):
    assert gpu.gpu_bench.markdown(gpu.gpu_bench.results(tmp_path)) == ""
    (tmp_path / "bench_qwen3-30b-a3b_50.json").write_text(json.dumps(result(0.5)))
    (tmp_path / "bench_qwen3-30b-a3b_25.json").write_text(json.dumps(result(0.25, tokens_differ=["ours"])))
    text = gpu.gpu_bench.markdown(gpu.gpu_bench.results(tmp_path))
    head, rule, low, high = (line for line in text.splitlines() if line.startswith("|"))
    assert {line.count("|") for line in (head, rule, low, high)} == {14}
    assert low.startswith("| qwen3-30b-a3b_6-layers, 25% | 200.0 | 150.0 | 75% | 80% | 80% | - (-x) | - (-x) | 50% |")
    assert "differ: ours" in low and "the same" in high and "4.00 (5.00)" in high
    assert "2026-11-26" in text and text.count("Routing of") == 1 and "accelerate failed: out of memory" in text


def test_a_part_that_hangs_ends_with_what_it_has_started(gpu):
    code, printed = gpu.run(["sh", "-c", "sleep 60 & echo $!; wait"], 1)
    assert code == 124 and "stopped after 1 s" in printed
    started = int(printed.split()[0])
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE
    assert gpu.run(["no-such-program"], 60)[0] == 127
    assert gpu.run(["sh", "-c", "exit 3"], 60) == (3, "")
