"""A run on one page: what is kept is checked like any hostile file, the page needs nothing but itself."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.report.advice import advice, headline, summary
from moe_offload.apps.report.charts import Line, heat_map, lines, nice, short
from moe_offload.apps.report.page import grouped, page
from moe_offload.apps.report.run_record import MAX_BYTES, RunRecord
from moe_offload.errors import ReportError
from moe_offload.files import whole_file

MODEL = Path(__file__).parents[3] / "examples" / "polyglot-tiny"
STEP = {"began_s": 0.0, "tokens": 1, "hits": 3, "misses": 1, "best": 4, "bytes_read": 100, "stall_s": 0.001}


def run_of(**changes):
    facts = {
        "created": "2026-11-26T10:00:00Z",
        "model": "tiny",
        "machine": {"cores": "2"},
        "budget_bytes": 3 * 10**9,
        "plan": {"dense weights": 10**9, "expert slots": 2 * 10**9},
        "profile": None,
        "prewarm_bytes": 0,
        "cold_first_hits": None,
        "ended_s": 10.0,
        "layers": [
            {"name": "layers.0", "top_k": 2, "slots": 2, "row_bytes": 50, "hits": 3, "misses": 1, "stall_s": 0.1,
             "counts": [3, 1, 0]}
        ],
        "steps": [{**STEP, "began_s": 0.0, "tokens": 20}, *({**STEP, "began_s": 1.0 + i * 0.1} for i in range(80))],
        "curve": [
            {"residency": r, "budget_bytes": int(b * 1e9), "hit_rate": h, "bytes_per_token": 1e8 * (1 - h)}
            for r, b, h in [(0.1, 2, 0.5), (0.25, 3, 0.75), (0.5, 5, 0.96), (1.0, 9, 0.97)]
        ],
    }  # fmt: skip
    return RunRecord.model_validate({**facts, **changes})


def test_round_trip(tmp_path):
    run = run_of()
    assert RunRecord.load(run.save(tmp_path / "run.json")) == run


def test_no_best_is_claimed_where_the_run_was_better():
    warm = run_of(steps=[{**STEP, "hits": 3, "best": 1}])
    assert "at best" not in headline(warm) and not any("future" in sentence for sentence in advice(warm))
    assert "Belady" in page(run_of()) and "Belady" not in page(warm)
    with_profile = run_of(profile="it.json", cold_first_hits=1, prewarm_bytes=100)
    assert "at best" not in headline(with_profile) and not any("budget of" in x for x in advice(with_profile))


def test_a_run_from_the_command_line_to_the_page(tmp_path):
    run, html = tmp_path / "run.json", tmp_path / "report.html"
    command = ["run", str(MODEL), "--budget", "6MB", "--prompt", "Il comando ls", "--max-new-tokens", "40"]
    done = CliRunner().invoke(app, [*command, "--save-report", str(run)])
    assert done.exit_code == 0 and "moe-offload report" in done.stderr, done.output
    done = CliRunner().invoke(app, ["report", str(run), "-o", str(html), "--save-charts", str(tmp_path)])
    assert done.exit_code == 0, done.output
    record = RunRecord.load(run)
    assert summary(record).decoded == 39 and len(record.layers) == 4
    assert sum(s.hits for s in record.steps) == sum(x.hits for x in record.layers)
    assert all(0 <= s.best <= s.hits + s.misses for s in record.steps)
    assert sum(s.best for s in record.steps) >= sum(s.hits for s in record.steps)
    assert [p.hit_rate for p in record.curve] == sorted(p.hit_rate for p in record.curve)
    here = min(record.curve, key=lambda p: abs(p.budget_bytes - 6_000_000))
    assert abs(here.hit_rate - sum(s.hits for s in record.steps) / sum(s.hits + s.misses for s in record.steps)) < 0.1
    text = html.read_text()
    assert "tokens a second" in text and text.count("<svg") == 5 and "layers.3" in text
    assert all(
        (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("hits", "experts", "budgets")
    )


def test_with_a_profile_the_page_says_what_it_brought(tmp_path):
    profile, run = tmp_path / "it.json", tmp_path / "run.json"
    command = ["run", str(MODEL), "--budget", "6MB", "--prompt", "Il comando ls", "--max-new-tokens", "40"]
    assert CliRunner().invoke(app, [*command, "--save-profile", str(profile)]).exit_code == 0
    done = CliRunner().invoke(app, [*command, "--profile", str(profile), "--save-report", str(run)])
    assert done.exit_code == 0, done.output
    record = RunRecord.load(run)
    assert record.profile == "it.json" and record.prewarm_bytes > 0 and record.cold_first_hits is not None
    assert record.cold_first_hits < sum(s.hits for s in record.steps[:33])
    assert any("it.json" in sentence and "instead of" in sentence for sentence in advice(record))


def test_the_page_needs_nothing_else_and_believes_nobody():
    run = run_of(model="<script>alert(1)</script>", machine={"<b>": "</style>"}, profile="<img onerror=x>")
    run = run.model_copy(update={"layers": [run.layers[0].model_copy(update={"name": "</title><script>x</script>"})]})
    text = page(run)
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"https?:|src=|@import|url\(|<link", text.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"\bNone\b|\bnan\b|undefined", text)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [], "ended_s": 0.0},
        {"steps": [STEP]},
        {"curve": []},
        {"layers": [{"name": "x", "top_k": 1, "slots": 0, "row_bytes": 0, "hits": 0, "misses": 0, "stall_s": 0.0,
                     "counts": [0]}]},
    ],
    ids=["nothing ran", "a prompt only", "no curve", "an unused layer"],
)  # fmt: skip
def test_runs_with_little_in_them(changes):
    text = page(run_of(**changes))
    assert "<h1>" in text and "None" not in text


def test_words():
    run = run_of()
    assert headline(run) == "8.9 tokens a second; 75% of what was asked for was resident (at best: 100%), " \
        "1% of the time spent waiting for experts."  # fmt: skip
    said = advice(run)
    assert said[0] == "A budget of 5.00 GB (50% of the experts) would have hit about 96% on this run, and read " \
        "21.00 MB less a token."  # fmt: skip
    assert any("processor was" in sentence for sentence in said) and any("25 points" in sentence for sentence in said)
    slow = run_of(steps=[{**STEP, "began_s": i * 1.0, "stall_s": 0.5} for i in range(10)])
    assert any("was the wall" in sentence and "not" not in sentence for sentence in advice(slow))
    flat = run_of(curve=[p.model_dump() for p in run.curve[:2]])
    assert advice(flat)[0] == "More memory would hardly have changed the hit rate of this run."


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it is empty"),
        (b"[" * 10_000, "nested"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"format": "moe_offload.run", "version": 2}', "version is 2"),
        (b'{"x": NaN}', "not JSON"),
        (b"\x80\x04K\x01.", "pickle"),
        (json.dumps(run_of().model_dump() | {"surprise": 1}).encode(), "surprise"),
        (json.dumps(run_of().model_dump() | {"ended_s": 0.5}).encode(), "order of time"),
        (json.dumps(run_of().model_dump() | {"budget_bytes": -1}).encode(), "budget_bytes"),
        (json.dumps(run_of().model_dump() | {"steps": [STEP | {"hits": 1.5}]}).encode(), "hits"),
    ],
)
def test_spoilt_runs(tmp_path, data, found):
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(ReportError, match=found) as caught:
        RunRecord.load(path)
    assert "run.json" in str(caught.value)
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 6 and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "r.html").exists()


def test_a_huge_sparse_run(tmp_path):
    path = tmp_path / "run.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ReportError, match=str(MAX_BYTES)):
        RunRecord.load(path)


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    path = run_of().save(tmp_path / "run.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_file.os, "fsync", full)
    with pytest.raises(ReportError, match="No space left"):
        run_of(model="another").save(path)
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 6 and "No space left" in done.stderr
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_wrong_requests_are_one_line(tmp_path, monkeypatch):
    path = run_of().save(tmp_path / "run.json")
    for arguments, code, words in [
        (["report", str(tmp_path / "no.json")], 6, "No such file"),
        (["report", str(path), "-o", str(tmp_path / "no" / "r.html")], 2, "does not exist"),
        (
            ["report", str(path), "-o", str(tmp_path / "r.html"), "--save-charts", str(path / "no")],
            2,
            "no folder can be made",
        ),
    ]:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 6 and 'pip install -e ".[report]"' in done.stderr


def test_charts():
    assert [nice(v) for v in (0.03, 1, 1.5, 3, 99, 250)] == [0.04, 1.0, 2.0, 4.0, 100.0, 400.0]
    assert [short(v) for v in (0, 0.25, 2.5, 40, 1200)] == ["0", "0.25", "2.5", "40", "1,200"]
    drawn = lines([Line("a & b", [(0, 0), (10, 5)], "ours")], x="tokens", y="<y>", top=10)
    assert "a &amp; b" in drawn and "&lt;y&gt;" in drawn and "52.0,206.0 708.0,109.0" in drawn
    assert "nothing was recorded" in lines([], x="", y="")
    drawn = heat_map([("l", [0, 4, 1])])
    assert drawn.index("expert 1: 80.0%") < drawn.index("expert 2: 20.0%") and "expert 0" not in drawn
    assert "no expert has been used" in heat_map([("l", [0, 0])])
    assert [tokens for tokens, _ in grouped(run_of().steps)][-1] == 100
