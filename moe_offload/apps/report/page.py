"""One self-contained HTML page of a run: no script, no font, nothing from a network; every text of the run escaped."""

from __future__ import annotations

import os
from pathlib import Path

from ...config.sizes import format_size
from ...errors import ReportError
from ...files.whole_file import save_whole
from .advice import sum_up_run, write_advice, write_headline
from .charts import CHARTS, svg_of
from .run_record import RunRecord


def write_page(run: RunRecord, path: str | os.PathLike[str]) -> Path:
    """Write the report of `run` to `path`. Raises ReportError."""
    return save_whole(Path(path), render_page(run).encode(), "report", ReportError)


def render_page(run: RunRecord) -> str:
    """The page as text. Raises ReportError without jinja2 or matplotlib."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ReportError('a report needs jinja2: in the clone, pip install -e ".[report]"') from error
    environment = Environment(
        loader=PackageLoader("moe_offload.apps.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["size"] = lambda n: format_size(int(n))
    return environment.get_template("page.html").render(
        run=run,
        headline=write_headline(run),
        advice=write_advice(run),
        summary=sum_up_run(run),
        charts={name: Markup(svg_of(name, run)) for name in CHARTS},
    )
