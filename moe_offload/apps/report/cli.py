"""moe-offload report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import ConfigError
from ..options.checks import check_output


def report(
    run: Annotated[Path, typer.Argument(help="What moe-offload run --save-report has written.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    save_charts: Annotated[
        Path | None, typer.Option("--save-charts", help="Save the charts in this folder, too (.png).")
    ] = None,
) -> None:
    """One page about a run: hits beside the best possible, what was read and waited for, other budgets."""
    from .page import write_page
    from .run_record import RunRecord

    check_output("--out", out)
    if save_charts is not None:
        try:
            save_charts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--save-charts {save_charts}: no folder can be made there ({error.strerror})") from error
    loaded = RunRecord.load(run)
    typer.echo(f"{write_page(loaded, out)}")
    if save_charts is not None:
        from .charts import write_png

        for path in write_png(loaded, save_charts):
            typer.echo(f"{path}")
