"""`moe-offload simulate` as a person types it, and the rows it makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.simulate import plain, run
from moe_offload.apps.simulate.run import ALL, simulate
from moe_offload.errors import ConfigError
from moe_offload.observe.trace import Trace

SHARED = Path(__file__).parents[4] / "shared" / "traces"


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((60, 2, 8)) * rng.random((2, 8)), axis=2)[:, :, :2]
    return Trace.of(ids, [0, 20, 40], num_experts=[8, 8], meta={"row_bytes": "1000"}).save(tmp_path / "one.npz")


def command(*arguments):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_table_json_and_plot(path, tmp_path):
    out, png = tmp_path / "rows.json", tmp_path / "plot.png"
    options = ["--residency", "25%,50%", "--start", "warm,cold", "--out", out, "--save-plot", png]
    result = command(path, "--policies", "all", *options)
    assert result.exit_code == 0, result.output
    assert "one, cold, 50% of the experts (per layer: 4 slots)" in result.stdout and "gap closed" in result.stdout
    rows = json.loads(out.read_text())
    assert len(rows) == len(ALL) * 4 and {row["policy"] for row in rows} == set(ALL)
    assert all(row["bytes_per_token"] == row["misses_per_token"] * 1000 for row in rows)
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = command(path, "--policies", "all", *options[:4], "--json")
    assert json.loads(printed.stdout) == rows


def test_rows_are_what_the_cache_counts(path):
    trace = Trace.load(path)
    for pool in (False, True):
        rows = {row.policy: row for row in simulate([trace], ["lru", "default", "belady"], [0.5], pool=pool)}
        assert rows["lru"].gap_closed == 0 and rows["belady"].gap_closed == 1
        assert rows["lru"].hit_rate <= rows["belady"].hit_rate and rows["default"].hit_rate <= rows["belady"].hit_rate
    cold = simulate([trace], ["lru"], [0.5], starts=["cold"])[0]
    parts = [simulate([trace.requests(i, i + 1)], ["lru"], [0.5])[0].hit_rate for i in range(3)]
    assert cold.hit_rate == pytest.approx(sum(parts) / 3)


def test_without_numba_the_rows_are_the_same(path, monkeypatch):
    trace, options = Trace.load(path), {"starts": ["warm", "cold"]}
    asked, fast = [], run._fast()
    monkeypatch.setattr(run, "_fast", lambda: asked.append(1) or fast)
    short = simulate([trace], ALL, ["25%"], **options)
    assert fast and not asked, "numba would take longer to compile than this takes"
    monkeypatch.setattr(run, "COMPILED_EVENTS", 1)
    assert simulate([trace], ALL, ["25%"], **options) == short and asked
    monkeypatch.setattr(run, "_fast", lambda: None)
    assert simulate([trace], ALL, ["25%"], **options) == short


def test_what_is_no_trace_is_skipped_among_others_and_refused_alone(path, tmp_path):
    np.savez(tmp_path / "counts.npz", counts=np.ones(3))
    both = command(tmp_path / "counts.npz", path, "--policies", "lru")
    assert both.exit_code == 0 and both.stderr.count("\n") == 1 and "skipped" in both.stderr
    alone = command(tmp_path / "counts.npz")
    assert alone.exit_code == 6 and alone.stderr.count("\n") == 1 and "no array 'experts'" in alone.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policies", "best"], "policy 'best' does not exist; there are default, successors"),
        (["--policies", "lru:16"], "only decayed_lfu takes a half-life"),
        (["--policies", "decayed_lfu:nan"], "only decayed_lfu takes a half-life"),
        (["--policies", ","], "--policies ',': part 1 of 2 is empty"),
        (["--residency", "25%,,50%"], "--residency '25%,,50%': part 2 of 3 is empty"),
        (["--start", ""], "--start '': it is empty; write it by commas, as warm,cold"),
        (["--residency", "0%"], "no share"),
        (["--residency", "nan"], "no share"),
        (["--residency", "much"], "no share"),
        (["--start", "hot"], "start 'hot' does not exist"),
        (["--out", "no/such/folder/x.json"], "its folder does not exist"),
        (["--save-plot", "/dev/null"], "no ordinary file"),
    ],
)
def test_bad_input_is_one_line_and_code_2(path, options, says):
    result = command(path, *options)
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1, result.output


def test_a_plot_without_matplotlib(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = command(path, "--save-plot", tmp_path / "plot.png")
    assert result.exit_code == 6 and 'pip install -e ".[report]"' in result.stderr


def test_a_policy_of_one_s_own(path):
    class Random:
        def access(self, used, tokens):
            pass

        def victims(self, candidates, n):
            return sorted(candidates, key=lambda e: e * 7919 % 11)[:n]

        def seed(self, rates):
            pass

    (row,) = simulate([Trace.load(path)], ["mine"], ["50%"], extra={"mine": lambda experts, half_life: Random()})
    assert 0 < row.hit_rate < 1
    with pytest.raises(ConfigError, match="does not exist"):
        simulate([Trace.load(path)], ["mine"], ["50%"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded traces are not here")
def test_recorded_routing():
    """The reference that is beside the traces, within 0.1 points and its rounding; a slice is replayed plainly."""
    trace = Trace.load(SHARED / "qwen3-30b-a3b_k6_bigmoeonedge.npz")
    policies = ["lru", "lfu", "decayed_lfu:16", "decayed_lfu:64", "decayed_lfu:256", "belady", "belady_bypass"]
    rates = [100 * row.hit_rate for row in simulate([trace], policies, ["25%", "50%"])]
    reference = [78.1, 78.3, 79.3, 78.6, 78.3, 86.8, 87.3, 90.6, 90.6, 90.7, 90.7, 90.6, 91.5, 91.5]
    assert rates == pytest.approx(reference, abs=0.15)
    law = Trace.load(SHARED / "deepseek-v2-lite_esft_law.npz").requests(0, 1)
    for stream in run.per_layer(law)[::9]:
        for name in ("default", "decayed_lfu:16", "lrfu_classes"):
            replay = run._replay(name, {})
            wanted = plain.replay_policy(stream, 16, replay.make(stream))
            assert replay(stream, 16)[1].tolist() == wanted[1].tolist()
