"""What the commands share: their common options, and how a command ends that cannot go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NoReturn, TypeVar

import typer

from ..errors import BudgetError, OffloadError

T = TypeVar("T")
Model = Annotated[str, typer.Argument(help="Checkpoint folder, or the name of a Hub repository.", show_default=False)]
Budget = Annotated[
    str,
    typer.Option("--budget", help="All the model may hold: 8GB, 8GiB, 50% of free memory, a number of bytes, auto."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def or_exit(work: Callable[[], T], errors: tuple[type[Exception], ...] = (OffloadError,), code: int = 2) -> T:
    """What `work` returns; one line and exit code `code` for an error of ours (1 for a budget below the floor)."""
    try:
        return work()
    except errors as error:
        fail(str(error), 1 if isinstance(error, BudgetError) else code)


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"moe-offload: {message}", err=True)
    raise typer.Exit(code)
