"""moe-offload pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...checkpoint.new_folder import check_new
from ...config.sizes import size_problem
from ...errors import ConfigError
from ..options.checks import check_model
from ..options.ending import INTERRUPTED, fail
from ..options.flags import Model
from ..options.numbers import one_of


def pack(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; new or empty.", show_default=False)],
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file, unless one layer is.")] = "5GB",
    verify: Annotated[
        str,
        typer.Option(
            "--verify",
            help="Rows to read back and compare: sample (three a layer), all, none.",
            **one_of("sample", "all", "none"),
        ),
    ] = "sample",
) -> None:
    """Write a copy of a checkpoint whose experts are read in one piece and without conversion."""
    check_model(model)
    if wrong := size_problem(max_shard_size):
        raise ConfigError(f"--max-shard-size: size {max_shard_size!r} is not usable: {wrong}; write it as 5GB or 5GiB")
    check_new(out)
    from ...pack import pack_checkpoint

    try:
        written = pack_checkpoint(model, out, max_shard_size=max_shard_size, verify=verify)
    except KeyboardInterrupt:
        fail(f"interrupted; {out} was not written, and nothing was left behind", INTERRUPTED)
    typer.echo(str(written))
