"""What the commands share: their common options, and how a command ends that cannot go on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from ...checkpoint.folder import is_folder
from ...config.settings import DEFAULT, OffloadConfig, from_text, origins, resolve
from ...config.sizes import parse_share
from ...errors import BudgetError, ConfigError, OffloadError

T = TypeVar("T")


def whole(least: int, most: int | None = None) -> dict[str, Any]:
    """Settings of an option that takes a whole number, so that a wrong one is told what would be right."""
    return _number(int, least, most, "a whole number")


def seconds(least: float, most: float) -> dict[str, Any]:
    """As `whole`, of seconds."""
    return _number(float, least, most, "seconds")


def _number(read: Callable[[str], Any], least: float, most: float | None, what: str) -> dict[str, Any]:
    def parse(text: str) -> Any:
        try:
            number = read(str(text))  # a default comes as the number that it is
        except ValueError:
            number = None
        if number is None or not least <= number <= (math.inf if most is None else most):
            span = f"from {least} on" if most is None else f"from {least} to {most}"
            raise typer.BadParameter(f"{str(text)[:64]!r} is not accepted: it takes {what} {span}")
        return number

    return {"parser": parse, "metavar": "N"}


Model = Annotated[str, typer.Argument(help="Checkpoint folder, or the name of a Hub repository.", show_default=False)]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="All the model may hold: 8GB, 8GiB, 50% of free memory, a number of bytes, auto.",
        show_default="auto",
    ),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map", help='disk, cpu, auto, or a mapping: \'{"": cpu, "model.layers.*.mlp.experts": disk}\'.'
    ),
]
MaxMemory = Annotated[str | None, typer.Option("--max-memory", help="Limits per device: '{0: 8GB, cpu: 60GiB}'.")]
ProfileIn = Annotated[Path | None, typer.Option("--profile", help="Activation profile to predict the hit rate from.")]
PrewarmWith = Annotated[
    Path | None, typer.Option("--profile-in", help="Pre-warm the slots with this activation profile.")
]
SaveProfile = Annotated[
    Path | None, typer.Option("--profile-out", help="Save the activation profile of this run here.")
]
Context = Annotated[int | None, typer.Option("--context", help="Tokens of KV cache to make room for.", **whole(0))]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config_file",
        "--config-file",
        help="Settings (YAML or JSON) for what no flag and no MOE_OFFLOAD_* variable says.",
        show_default="$HF_HOME/moe_offload/default_config.yaml",
    ),
]
Live = Annotated[bool | None, typer.Option("--live/--no-live", help="Let `moe-offload top` watch.", show_default="on")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def summary(command: Callable[..., object]) -> str:
    """What the list of commands says of one: the whole first line of its docstring, which typer would cut."""
    return (command.__doc__ or "").partition("\n")[0]


def or_exit(work: Callable[[], T], errors: tuple[type[Exception], ...] = (OffloadError,), code: int = 2) -> T:
    """What `work` returns; one line and exit code `code` for an error of ours (1 for a budget below the floor)."""
    try:
        return work()
    except errors as error:
        fail(str(error), 1 if isinstance(error, BudgetError) else code)


def settings(config_file: Path | None, **flags: Any) -> OffloadConfig:
    """The settings in force: flags (None is not given), environment, file; one line and exit code 2 if they fail."""
    given = {name: flag for name, flag in flags.items() if flag is not None}
    read = {name: from_text(name, flag) if isinstance(flag, str) else flag for name, flag in given.items()}
    return or_exit(lambda: resolve(config_file, **read))


def live_or_default(live: bool | None, config_file: Path | None) -> bool | None:
    """The flag `--live` of a command that runs a model. Not given, it is on unless a setting says otherwise."""
    unsaid = live is None and or_exit(lambda: origins(config_file))["live"] == DEFAULT
    return True if unsaid else live


def check_inputs(model: str, wanted: OffloadConfig) -> None:
    """A model or a profile that is not there is refused before torch and transformers are imported, which takes
    seconds."""
    or_exit(lambda: is_folder(model))
    if wanted.profile is not None:
        from ...observe.profile import Profile

        or_exit(lambda: Profile.load(str(wanted.profile)))


def residency_share(text: str) -> float:
    """`--residency`, the share of experts that is kept: 25% or 0.25."""
    try:
        return parse_share(text)
    except ConfigError as error:
        fail(f"--residency {error}", 2)


def check_output(flag: str, out: Path | None) -> None:
    """Whether the file `out` can be written is asked before minutes of work, not after."""
    if out is None:
        return
    folder = out.resolve().parent
    if not folder.is_dir():
        fail(f"{flag} {out}: its folder does not exist", 2)
    if out.exists() and not out.is_file():
        fail(f"{flag} {out}: that is {'a folder' if out.is_dir() else 'no ordinary file'}; name a file", 2)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"{flag} {out}: nothing can be written in its folder ({error.strerror}); choose another", 2)


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"moe-offload: {message}", err=True)
    raise typer.Exit(code)
