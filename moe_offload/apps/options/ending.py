"""How a command ends that cannot go on: one line on standard error, and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import typer

from ...errors import BudgetError, OffloadError

T = TypeVar("T")


def or_exit(work: Callable[[], T], errors: tuple[type[Exception], ...] = (OffloadError,), code: int = 2) -> T:
    """What `work` returns; one line and exit code `code` for an error of ours (1 for a budget below the floor)."""
    try:
        return work()
    except errors as error:
        fail(str(error), 1 if isinstance(error, BudgetError) else code)


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"moe-offload: {message}", err=True)
    raise typer.Exit(code)
