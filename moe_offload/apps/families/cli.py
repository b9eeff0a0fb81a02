"""moe-offload families."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ..options.ending import fail
from ..options.flags import Json, whole


def families(
    names: Annotated[list[str] | None, typer.Argument(help="Families to check; all when none is named.")] = None,
    compile: Annotated[str, typer.Option("--compile", help="graph, or inductor (minutes per family).")] = "graph",
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Every implementation, dtype, batch, cache and budget, not a slice of them."),
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes to spread the families over.", **whole(1))] = (
        os.cpu_count() or 1
    ),
    as_json: Json = False,
) -> None:
    """Build a tiny random model of every MoE family of the installed transformers; run it resident and offloaded."""
    from .report import run_families

    if not run_families(
        names or [], compile=compile, matrix=matrix, as_json=as_json, jobs=jobs, fail=lambda m: fail(m, 2)
    ):
        raise typer.Exit(1)
