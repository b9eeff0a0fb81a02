"""How a command ends: one line on standard error, and one exit code per kind of refusal.

0    done
1    it failed while it ran; or `families` has found a model that differs
2    the command line or a setting is wrong
3    the budget is too small
4    the checkpoint is missing, damaged, incomplete, or was changed
5    the model cannot be run exactly
6    a file other than the checkpoint cannot be used or written: a profile, trace, report, packed copy; standard output
7    a server, port or running model cannot be had, or a package is missing for it
130  Ctrl-C
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from ...errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    ExpertReadError,
    LiveError,
    OffloadError,
    PackError,
    ProfileError,
    ReportError,
    SaveError,
    ServeError,
    TraceError,
    UnsupportedModelError,
)
from .ranks import first_speaks, rank_prefix, refuse_ranks, tell_ranks

FAILED, USAGE, UNWRITTEN, INTERRUPTED = 1, 2, 6, 130
EXIT_CODES: dict[type[OffloadError], int] = {
    ConfigError: USAGE,
    BudgetError: 3,
    CheckpointError: 4,
    ExpertReadError: 4,
    UnsupportedModelError: 5,
    ProfileError: UNWRITTEN,
    TraceError: UNWRITTEN,
    ReportError: UNWRITTEN,
    PackError: UNWRITTEN,
    SaveError: UNWRITTEN,
    ServeError: 7,
    LiveError: 7,
}


class Command(TyperCommand):
    """A command that ends with one line and the exit code of its kind when it raises an error of ours.

    With `--json` the error is an object on standard output too, so that a script always finds JSON there.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            with first_speaks():
                refuse_ranks(_path_of(ctx))
                return super().invoke(ctx)
        except typer.Exit as ended:
            if ended.exit_code:
                why = f"the command ended with exit code {ended.exit_code}; its own output says why"
                tell_ranks(_path_of(ctx), ConfigError(why))
            raise
        except OffloadError as error:
            if ctx.params.get("as_json") and rank_prefix() in ("", "rank 0: "):
                typer.echo(json.dumps(error_json(error)))
            try:
                fail_with(str(error), exit_code(error))
            finally:  # the line first: to tell the others takes a while
                tell_ranks(_path_of(ctx), error)
        except KeyboardInterrupt:
            fail_with("interrupted", INTERRUPTED)


def _path_of(context: Any) -> str:
    """The command as it is typed after `moe-offload`: "profile record"."""
    words: list[str] = []
    while context.parent is not None:
        words.insert(0, context.info_name)
        context = context.parent
    return " ".join(words)


def exit_code(error: OffloadError) -> int:
    """The exit code of the nearest class that `EXIT_CODES` names."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), FAILED)


def error_json(error: OffloadError) -> dict[str, Any]:
    """What `--json` prints of a refusal."""
    return {"error": {"type": type(error).__name__, "message": str(error), "exit_code": exit_code(error)}}


def fail_with(message: str, code: int) -> NoReturn:
    """End the command: one line on standard error, however many lines the message has."""
    typer.echo(f"moe-offload: {rank_prefix()}{' '.join(message.split())}", err=True)
    raise typer.Exit(code)
