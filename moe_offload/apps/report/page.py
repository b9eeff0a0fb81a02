"""One self-contained HTML page of a run: no script, no font, nothing from a network; every text of the run escaped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...config.sizes import format_size
from ...errors import ReportError
from ...files.whole_file import save_whole
from .advice import advice, headline, rate, summary
from .run_record import RunRecord, StepPart

POINTS = 80  # of a line: enough to see where it goes, few enough to smooth what jumps from token to token


def write_page(run: RunRecord, path: str | os.PathLike[str]) -> Path:
    """Write the report of `run` to `path`. Raises ReportError."""
    return save_whole(Path(path), page(run).encode(), "report", ReportError)


def page(run: RunRecord) -> str:
    """The page as text. Raises ReportError without jinja2."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ReportError('a report needs jinja2: in the clone, pip install -e ".[report]"') from error
    from .charts import Line, heat_map, lines

    environment = Environment(
        loader=PackageLoader("moe_offload.apps.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["size"] = lambda n: format_size(int(n))
    unit, scale = ("GB", 1e9) if run.budget_bytes >= 10**9 else ("MB", 1e6)
    groups = grouped(run.steps)
    decode = grouped(run.steps[1:])
    facts = summary(run)
    best = [Line("Belady's best", [(at, 100 * (rate(g, best=True) or 0)) for at, g in groups], "best")]
    return environment.get_template("page.html").render(
        run=run,
        headline=headline(run),
        advice=advice(run),
        summary=facts,
        hit_chart=lines(
            [
                *(best if facts.best_rate is not None else []),
                Line("this run", [(at, 100 * (rate(g) or 0)) for at, g in groups], "ours"),
            ],
            x="tokens", y="hit rate, %", top=100,
        ),
        read_chart=lines(
            [Line("read", [(at, _per_token(g, "bytes_read") / 1e6) for at, g in decode], "ours")],
            x="tokens", y="MB read per token",
        ),
        stall_chart=lines(
            [Line("waited", [(at, 1e3 * _per_token(g, "stall_s")) for at, g in decode], "warm")],
            x="tokens", y="ms waited per token",
        ),
        heat=heat_map([(layer.name, layer.counts) for layer in run.layers]),
        curve_chart=lines(
            [Line("default policy", [(p.budget_bytes / scale, 100 * p.hit_rate) for p in run.curve], "ours")],
            x=f"budget, {unit} (the line: this run's)", y="hit rate of this run, %", top=100,
            mark=min(run.budget_bytes, max((p.budget_bytes for p in run.curve), default=0)) / scale,
        ),
    )  # fmt: skip


def grouped(steps: Sequence[StepPart]) -> list[tuple[int, list[StepPart]]]:
    """At most POINTS groups of neighbours, each with the number of tokens up to its end."""
    size = max(1, -(-len(steps) // POINTS))
    found, tokens = [], 0
    for i in range(0, len(steps), size):
        group = list(steps[i : i + size])
        tokens += sum(step.tokens for step in group)
        found.append((tokens, group))
    return found


def _per_token(group: Sequence[StepPart], name: str) -> float:
    return float(sum(getattr(step, name) for step in group)) / max(sum(step.tokens for step in group), 1)
