"""moe-offload report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options.checks import check_output
from ..options.ending import fail, or_exit


def report(
    run: Annotated[Path, typer.Argument(help="What moe-offload run --report has written.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option("--png", help="A folder for the charts as PNG, too.")] = None,
) -> None:
    """One page about a run: hits beside the best possible, what was read and waited for, other budgets."""
    from .page import write_page
    from .run_record import RunRecord

    check_output("--out", out)
    if png is not None:
        try:
            png.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--png {png}: no folder can be made there ({error.strerror})", 2)
    loaded = or_exit(lambda: RunRecord.load(run))
    typer.echo(f"{or_exit(lambda: write_page(loaded, out))}")
    if png is not None:
        from .png import write_png

        for path in or_exit(lambda: write_png(loaded, png)):
            typer.echo(f"{path}")
