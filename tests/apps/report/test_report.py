"""A run on one page: what is kept is checked like any hostile file, the page needs nothing but itself."""

from __future__ import annotations

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.report import collect
from moe_offload.apps.report.advice import sum_up_run, write_advice, write_headline
from moe_offload.apps.report.charts import CHARTS, VARIABLES, group_forwards, svg_of
from moe_offload.apps.report.page import render_page
from moe_offload.apps.report.run_record import MAX_BYTES, RunRecord
from moe_offload.cache.counters import COUNTERS
from moe_offload.errors import ReportError
from moe_offload.files import whole_file
from tests.paths import MODEL

STEP = {"began_s": 0.0, "ended_s": 0.0, "compile_s": 0.0, "decode": True, "tokens": 1, "hits": 3, "misses": 1}
STEP |= {"best": 4, "bytes_read": 100, "stall_s": 0.001}
LAYER = {"name": "layers.0", "experts": 3, "slots": 2, "resident": 2, "row_bytes": 50, "hits": 3, "misses": 1}


def step(began_s, ended_s, **changes):
    return {**STEP, "began_s": began_s, "ended_s": ended_s, **changes}


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
        "layers": [{**LAYER, "counts": [3, 1, 0]}],
        "forwards": [
            step(0.0, 3.0, tokens=20, decode=False, compile_s=2.0),
            *(step(3.0 + i * 0.0875, 3.05 + i * 0.0875) for i in range(80)),
        ],
        "curve": [
            {"residency": r, "budget_bytes": int(b * 1e9), "hit_rate": h, "bytes_per_token": 1e8 * (1 - h)}
            for r, b, h in [(0.1, 2, 0.5), (0.25, 3, 0.75), (0.5, 5, 0.96), (1.0, 9, 0.97)]
        ],
    }  # fmt: skip
    return RunRecord.model_validate_json(json.dumps({**facts, **changes}))


def test_round_trip(tmp_path):
    run = run_of()
    assert RunRecord.load(run.save(tmp_path / "run.json")) == run


def test_no_best_is_claimed_where_the_run_was_better():
    warm = run_of(forwards=[{**STEP, "best": 1}])
    assert "at best" not in write_headline(warm) and not any("future" in sentence for sentence in write_advice(warm))
    assert "Belady" in render_page(run_of()) and "Belady" not in render_page(warm)
    with_profile = run_of(profile="it.json", cold_first_hits=1, prewarm_bytes=100)
    assert "at best" not in write_headline(with_profile) and not any(
        "budget of" in x for x in write_advice(with_profile)
    )


class Bar:
    """Counts what a bar is told."""

    def __init__(self, stage, total, **_):
        self.left, self.stage = total, stage

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert (self.stage, self.left) == ("Replaying", 0)

    def update(self, n):
        self.left -= n


def test_a_run_from_the_command_line_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "show_bar", Bar)
    run, html = tmp_path / "run.json", tmp_path / "report.html"
    command = ["run", str(MODEL), "--budget", "6MB", "--prompt", "Il comando ls", "--max-new-tokens", "40"]
    done = CliRunner().invoke(app, [*command, "--save-report", str(run)])
    assert done.exit_code == 0 and "moe-offload report" in done.stderr, done.output
    done = CliRunner().invoke(app, ["report", str(run), "-o", str(html), "--save-charts", str(tmp_path)])
    assert done.exit_code == 0, done.output
    record = RunRecord.load(run)
    facts = sum_up_run(record)
    assert 0 < facts.first_token_s < facts.compile_s, "compiling takes seconds here, and is no part of it"
    assert facts.decoded == 39 and len(record.layers) == 4
    assert sum(s.hits for s in record.forwards) == sum(x.hits for x in record.layers)
    assert all(0 <= s.best <= s.requests for s in record.forwards)
    assert sum(s.best for s in record.forwards) >= sum(s.hits for s in record.forwards)
    assert [p.hit_rate for p in record.curve] == sorted(p.hit_rate for p in record.curve)
    here = min(record.curve, key=lambda p: abs(p.budget_bytes - 6_000_000))
    assert abs(here.hit_rate - sum(s.hits for s in record.forwards) / sum(s.requests for s in record.forwards)) < 0.1
    text = html.read_text()
    assert "time to first token" in text and len(text) < 200_000
    assert (
        "tokens a second" in text
        and text.count("<svg") == 5
        and "time to first token" in text
        and len(text) < 200_000
        and "layers.3" in text
    )
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in CHARTS)


def test_with_a_profile_the_page_says_what_it_brought(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "show_bar", Bar)
    profile, run = tmp_path / "it.json", tmp_path / "run.json"
    command = ["run", str(MODEL), "--budget", "6MB", "--prompt", "Il comando ls", "--max-new-tokens", "40"]
    assert CliRunner().invoke(app, [*command, "--save-profile", str(profile)]).exit_code == 0
    done = CliRunner().invoke(app, [*command, "--profile", str(profile), "--save-report", str(run)])
    assert done.exit_code == 0, done.output
    record = RunRecord.load(run)
    assert record.profile == "it.json" and record.prewarm_bytes > 0 and record.cold_first_hits is not None
    assert record.cold_first_hits < sum(s.hits for s in record.forwards[:33])
    assert any("it.json" in sentence and "instead of" in sentence for sentence in write_advice(record))


def test_the_page_needs_nothing_else_and_believes_nobody():
    run = run_of(model="<script>alert(1)</script>", machine={"<b>": "</style>"}, profile="<img onerror=x>")
    run.layers[0].name = "</title><script>x</script>"
    text = render_page(run)
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;alert(1)" in text
    text = re.sub(r"http://www.w3.org/(2000/svg|1999/xlink)", "", text)
    assert not re.search(r"https?:|src=|@import|url\((?!#)|<link", text)
    assert not re.search(r"\bNone\b|\bnan\b|undefined", text)


@pytest.mark.parametrize(
    "changes",
    [
        {"forwards": [], "ended_s": 0.0},
        {"forwards": [{**STEP, "decode": False}]},
        {"curve": []},
        {"layers": [{**LAYER, "hits": 0, "misses": 0, "counts": [0]}]},
    ],
    ids=["nothing ran", "a prompt only", "no curve", "an unused layer"],
)  # fmt: skip
def test_runs_with_little_in_them(changes):
    text = render_page(run_of(**changes))
    assert "<h1>" in text and "None" not in text


def test_words():
    run = run_of()
    assert write_headline(run) == "11.5 tokens a second; 75% of what was asked for was resident (at best: 100%), " \
        "1% of the time spent waiting for experts."  # fmt: skip
    said = write_advice(run)
    assert said[0] == "A budget of 5.00 GB (50% of the experts) would have hit about 96% on this run, and read " \
        "21.00 MB less a token."  # fmt: skip
    assert any("processor was" in sentence for sentence in said) and any("25 points" in sentence for sentence in said)
    slow = run_of(forwards=[step(i * 1.0, i + 1.0, stall_s=0.5) for i in range(10)])
    assert any("was the wall" in sentence and "not" not in sentence for sentence in write_advice(slow))
    flat = run_of(curve=[p.model_dump() for p in run.curve[:2]])
    assert write_advice(flat)[0] == "More memory would hardly have changed the hit rate of this run."


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
        (json.dumps(run_of().model_dump() | {"forwards": [STEP | {"hits": 1.5}]}).encode(), "hits"),
        (json.dumps(run_of().model_dump() | {"forwards": [STEP | {"hits": -1}]}).encode(), "hits"),
        (json.dumps(run_of().model_dump() | {"forwards": [STEP | {"surprise": 1}]}).encode(), "surprise"),
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


def test_compiling_is_in_no_time_but_its_own():
    """The prompt took 3 s, of which 2 s were compiling; the tokens after it come every 87.5 ms."""
    facts = sum_up_run(run_of())
    assert facts.first_token_s == 1.0 and facts.compile_s == 2.0 and (facts.prompt_tokens, facts.decoded) == (20, 80)
    assert facts.token_s == pytest.approx((79 * 0.0875 + 0.05) / 80)
    text = render_page(run_of())
    assert "2.0 s</b><span>compiling, once" in text and "time to first token, without compiling" in text
    # A chat: a second prompt is no decoding, and nobody's thinking about it is a token's time.
    chat = sum_up_run(run_of(forwards=[step(0.0, 1.0, tokens=9, decode=False), step(1.0, 2.0), step(5.0, 6.0, tokens=7,
                   decode=False), step(6.0, 7.0)]))  # fmt: skip
    assert (chat.prompt_tokens, chat.decoded, chat.first_token_s, chat.token_s) == (16, 2, 1.0, 1.0)
    # A prompt in pieces.
    pieces = run_of(
        forwards=[step(i, i + 1.0, tokens=9, decode=False, compile_s=0.25) for i in range(3)] + [step(3.5, 4.0)]
    )
    assert sum_up_run(pieces).first_token_s == 0.75 + 0.75 + 1.25


def test_neighbours_are_put_together_without_losing_anything(monkeypatch):
    monkeypatch.setattr(collect, "MAX_FORWARDS", 40)
    parts = run_of().forwards
    together = collect.put_together([*parts, *parts])
    assert len(together) <= 40 and together[0] == parts[0]
    for name in COUNTERS:
        assert sum(getattr(one, name) for one in together) == 2 * sum(getattr(one, name) for one in parts), name


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_readable_on_a_phone(name):
    """On 350 pixels, what a phone of 390 leaves between the margins."""
    svg = svg_of(name, run_of())
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    assert 'width="' not in svg[: svg.index(">")], "the page says how wide it is"
    sizes = [float(points) * 350 / width for points in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert sizes and min(sizes) >= 10, sizes


def test_charts_have_the_colours_of_the_page_and_ids_of_their_own():
    text = render_page(run_of())
    assert not any(colour in text.partition("</style>")[2] for colour in VARIABLES)
    assert all(f"{variable}:" in text.partition("</style>")[0] for variable in VARIABLES.values())
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and all(f'id="{of}"' in text for of in re.findall(r"url\(#([^)]*)\)", text))
    assert [tokens for tokens, _ in group_forwards(run_of().forwards)][-1] == 100


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"-e \"\.\[report\]\""):
        render_page(run_of())
