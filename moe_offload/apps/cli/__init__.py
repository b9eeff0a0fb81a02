"""The command line, a file a command: moe-offload plan | estimate | run | top | report | profile | ...

What a person asked for goes to standard output (a plan, generated text, a table); what happened on the way goes to
standard error. A flag, size, path or profile that cannot work is one line and exit code 2; a budget below the floor, or
a family that differs, is exit code 1.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ... import __version__
from ..bench.cli import bench
from ..families.cli import families
from ..generate.chat import chat
from ..generate.run import run
from ..options.flags import summary
from ..profile.cli import app as profile
from ..report.cli import report
from ..serving.cli import serve
from ..simulate.cli import simulate
from .config import config
from .estimate import estimate
from .pack import pack
from .plan import plan
from .top import top

app = typer.Typer(
    name="moe-offload",
    help="Run Mixture-of-Experts models that do not fit: hot experts stay, the rest stream in just in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich cuts option names and defaults that are long; plain help wraps them
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=lambda wanted: _version() if wanted else None,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """What may come before a command."""


for command in (plan, estimate, run, chat, serve, top, report, config, bench, pack, simulate, families):
    app.command(short_help=summary(command))(command)
app.add_typer(profile, name="profile", short_help="Record, look at, merge and compare activation profiles.")


def _version() -> None:
    typer.echo(f"moe-offload {__version__}")
    raise typer.Exit


def main() -> None:
    """What the console script runs. A wrong flag is one line and exit code 2, like everything else that cannot work."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        typer.echo("moe-offload: aborted", err=True)
        code = 1
    except Exception as error:
        # Typer carries click within itself in some versions, so the class of its errors has no lasting name.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "moe-offload"
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(context.get_help() if context is not None else "", err=True)
        else:
            typer.echo(f"{command}: {' '.join(error.format_message().split())} (see {command} --help)", err=True)
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)
