"""The command line: moe-offload run | chat | serve | plan | estimate | ...

The commands that belong to an app lie beside it; here are those of no app (plan, estimate, config, pack, env), and what
puts all of them together. What a person asked for goes to standard output (a plan, generated text, a table, JSON); what
happened on the way goes to standard error. How a command ends is in `options/ending.py`.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import Annotated, Any

import typer

from ... import __version__
from ..bench.cli import bench
from ..families.cli import families
from ..generate.chat import chat
from ..generate.run import run
from ..live.cli import top
from ..options.elsewhere import command_elsewhere, flag_elsewhere
from ..options.ending import UNWRITTEN, USAGE, Command
from ..options.groups import summary_line
from ..profile.cli import app as profile
from ..report.cli import report
from ..serving.cli import serve
from ..simulate.cli import simulate
from .config import config
from .env import env
from .estimate import estimate
from .pack import pack
from .plan import plan

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)

app = typer.Typer(
    name="moe-offload",
    help="Run Mixture-of-Experts models that do not fit: hot experts stay, the rest stream in just in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich cuts option names and defaults that are long; plain help wraps them
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --config_file is --config-file
    },
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


for command in (run, chat, serve, plan, estimate, top, report, config, env, pack, simulate, bench, families):
    app.command(short_help=summary_line(command), cls=Command)(command)
app.add_typer(profile, name="profile", short_help="Record, look at, merge and compare activation profiles.")


def _version() -> None:
    typer.echo(f"moe-offload {__version__}")
    raise typer.Exit


def _wrong(error: Any, context: Any) -> str:
    """What is wrong with a command line, in one line. A flag or command of another tool is answered with
    ours for it."""
    said = " ".join(error.format_message().split())
    option, command = getattr(error, "option_name", None), re.match("No such command '(.+?)'", said)
    elsewhere = None
    if option is not None and said.startswith("No such option"):
        known = {name for parameter in context.command.params for name in parameter.opts} if context else set()
        elsewhere = flag_elsewhere(option, sys.argv[1:], known)
    elif command is not None:
        elsewhere = command_elsewhere(command[1])
    return said if elsewhere is None else f"{said.split(' (')[0].rstrip('.')}; {elsewhere}"


def _asked_command(words: list[str]) -> str:
    """The command that a command line begins with; the error of an option without its value does not say."""
    command: Any = typer.main.get_command(app)
    path = ["moe-offload"]
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
        path.append(word)
    return " ".join(path)


def main() -> None:
    """What the console script runs. A wrong flag is one line and exit code 2, a full disk below standard output one
    line and exit code 6."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is not None:
            raise
        typer.echo(f"moe-offload: standard output cannot be written: {error.strerror} (errno {error.errno})", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it is written when Python ends
        code = UNWRITTEN
    except typer.Abort:
        typer.echo("moe-offload: aborted", err=True)
        code = 1
    except Exception as error:
        # Typer carries click within itself in some versions, so the class of its errors has no lasting name.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else _asked_command(sys.argv[1:])
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(context.get_help() if context is not None else "", err=True)
        else:
            typer.echo(f"{command}: {_wrong(error, context)} (see {command} --help)", err=True)
        code = getattr(error, "exit_code", USAGE)
    sys.exit(code if isinstance(code, int) else 0)
