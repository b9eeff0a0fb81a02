"""The flags that several commands take: one name, one meaning, one help text each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


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
