"""moe-offload simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options.flags import Json


def simulate(
    traces: Annotated[
        list[Path], typer.Argument(help="Traces (.npz); files that are no trace are skipped.", show_default=False)
    ],
    policies: Annotated[
        str, typer.Option("--policies", help="By commas: default, lru, decayed_lfu:16, belady, ...; or all.")
    ] = "all",
    residency: Annotated[
        str, typer.Option("--residency", help="Share of the experts that is resident: 25%; several by commas.")
    ] = "25%",
    start: Annotated[
        str, typer.Option("--start", help="warm: the cache outlives a request; cold: it does not; or warm,cold.")
    ] = "warm",
    pooled: Annotated[bool, typer.Option("--pooled", help="One cache for all layers.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The JSON file to write, too.")] = None,
    save_plot: Annotated[
        Path | None, typer.Option("--save-plot", help="Save hit rate over residency here (.png).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay traces through the cache: hit rates of policies at several residencies, beside Belady's MIN."""
    from .command import run_simulation
    from .show import format_table, rows_json

    rows = run_simulation(
        traces,
        policies=policies,
        capacities=residency,
        starts=start,
        pooled=pooled,
        json_file=out,
        plot=save_plot,
        note=lambda line: typer.echo(f"moe-offload: {line}", err=True),
    )
    typer.echo(rows_json(rows) if as_json else format_table(rows))
