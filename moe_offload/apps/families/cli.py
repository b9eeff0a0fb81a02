"""moe-offload families."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ...errors import ConfigError
from ..options.ending import FAILED
from ..options.flags import Json
from ..options.numbers import one_of, whole
from .table import FAMILIES


def families(
    names: Annotated[list[str] | None, typer.Argument(help="Families to check; all when none is named.")] = None,
    compile: Annotated[
        str,
        typer.Option(
            "--compile",
            help="graph: the model's own kernels; inductor: compile them (minutes a family).",
            **one_of("graph", "inductor"),
        ),
    ] = "graph",
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Every implementation, dtype, batch, cache and budget, not a slice of them."),
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes to spread the families over.", **whole(1))] = (
        os.cpu_count() or 1
    ),
    quantised: Annotated[
        bool, typer.Option("--quantised", help="Every format of quantised experts, with families it is published for.")
    ] = False,
    foreign: Annotated[
        Path | None,
        typer.Option("--foreign", help="Instead: run the code in this folder, or in the folders in it. It is trusted."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as the documentation has it.")] = False,
    into: Annotated[
        Path | None, typer.Option("--into", help="With --quantised: write the table into this page, between its marks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build a tiny random model of every MoE family of the installed transformers; run it resident and offloaded."""
    if foreign is not None:
        if names or quantised or matrix or into is not None or compile != "graph":
            raise ConfigError("--foreign has one matrix, and no families: of the other flags give --markdown or --json")
        _families_foreign(foreign, markdown, as_json)
        return
    if quantised:
        if compile != "graph" or matrix:
            raise ConfigError("--quantised has one matrix and no compiler of its own: leave --compile and --matrix out")
        _families_quantised(names or [], jobs, markdown, into, as_json)
        return
    if into is not None:
        raise ConfigError("--into is for the table of --quantised: give that as well, or --markdown, which prints")
    if unknown := [name for name in names or [] if name not in FAMILIES]:
        raise ConfigError(f"{unknown[0]!r} is no MoE family that is known here; there are {', '.join(FAMILIES)}")
    from .report import check_families, format_line, format_totals, markdown_table, rows_json

    quiet = as_json or markdown
    rows = check_families(
        names or [],
        compile=compile,
        matrix=matrix,
        jobs=jobs,
        done=lambda row: None if quiet else typer.echo(format_line(row)),
    )
    if as_json:
        typer.echo(rows_json(rows))
    elif markdown:
        typer.echo(markdown_table(rows))
    else:
        typer.echo(format_totals(rows))
    if not all(row.status in ("exact", "refused") for row in rows):
        raise typer.Exit(FAILED)


def _families_foreign(folder: Path, markdown: bool, as_json: bool) -> None:
    from .foreign import find_folders
    from .report import check_foreign_folders, format_line, markdown_table, rows_json

    quiet = as_json or markdown
    rows = check_foreign_folders(find_folders(folder), done=lambda row: None if quiet else typer.echo(format_line(row)))
    if quiet:
        typer.echo(rows_json(rows) if as_json else markdown_table(rows))
    if not all(row.status in ("exact", "refused") for row in rows):
        raise typer.Exit(FAILED)


def _families_quantised(names: list[str], jobs: int, markdown: bool, into: Path | None, as_json: bool) -> None:
    from .quantised.page import check_page, tables, write_tables
    from .report import check_quantised_families, quantised_line, rows_json

    if into is not None:
        check_page(into)  # before minutes of work
    quiet = as_json or markdown
    rows = check_quantised_families(
        names, jobs=jobs, done=lambda row: None if quiet else typer.echo(quantised_line(row))
    )
    if into is not None:
        write_tables(into, rows)
    if as_json:
        typer.echo(rows_json(rows))
    elif markdown:
        typer.echo(tables(rows))
    if any(row.status in ("different", "failed") for row in rows):
        raise typer.Exit(FAILED)
