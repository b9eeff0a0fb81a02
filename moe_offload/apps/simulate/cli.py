"""moe-offload simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options.ending import or_exit


def simulate(
    traces: Annotated[list[Path], typer.Argument(help="Traces (.npz); what is none is skipped.", show_default=False)],
    policies: Annotated[
        str, typer.Option("--policies", help="By commas: default, lru, decayed_lfu:16, belady, ...; or all.")
    ] = "all",
    capacity: Annotated[str, typer.Option("--capacity", help="Shares of a layer's experts, by commas.")] = "25%",
    start: Annotated[
        str, typer.Option("--start", help="warm: the cache outlives a request; cold: it does not; or warm,cold.")
    ] = "warm",
    pooled: Annotated[bool, typer.Option("--pooled", help="One cache for all layers.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here, too.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write hit rate over capacity here, as PNG.")] = None,
) -> None:
    """Replay traces through the cache: hit rates of policies at several capacities, beside Belady's MIN."""
    from .command import run as run_simulation

    typer.echo(
        or_exit(
            lambda: run_simulation(
                traces,
                policies=policies,
                capacities=capacity,
                starts=start,
                pooled=pooled,
                json_file=json_file,
                plot=plot,
                note=lambda line: typer.echo(f"moe-offload: {line}", err=True),
            )
        )
    )
