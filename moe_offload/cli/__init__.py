"""The command line, a file a command: moe-offload plan | estimate | run | top | report | profile | ...

What a person asked for goes to standard output (a plan, generated text, a table); what happened on the way goes to
standard error. A flag, size, path or profile that cannot work is one line and exit code 2; a budget below the floor, or
a family that differs, is exit code 1.
"""

from __future__ import annotations

import typer

from .bench import bench
from .chat import chat
from .config import config
from .estimate import estimate
from .families import families
from .pack import pack
from .plan import plan
from .profile import app as profile
from .report import report
from .run import run
from .serve import serve
from .simulate import simulate
from .top import top

app = typer.Typer(
    name="moe-offload",
    help="Run Mixture-of-Experts models that do not fit: hot experts stay, the rest stream in just in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (plan, estimate, run, chat, serve, top, report, config, bench, pack, simulate, families):
    app.command()(command)
app.add_typer(profile, name="profile")


def main() -> None:
    """The console script."""
    app()
