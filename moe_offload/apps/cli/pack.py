"""moe-offload pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...checkpoint.new_folder import check_new
from ...config.sizes import size_problem
from ...errors import ConfigError
from ..options.checks import check_model, settings_of_flags
from ..options.ending import INTERRUPTED, fail_with
from ..options.flags import Budget, Model, TrustRemoteCode
from ..options.numbers import one_of

KINDS = ("mxfp4", "int4", "fp8")


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
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            help="Round experts to mxfp4, int4 or fp8, which is lossy; the copy is an ordinary quantised checkpoint.",
            **one_of(*KINDS),
        ),
    ] = None,
    measure: Annotated[
        Path | None, typer.Option("--measure", help="With --experts: perplexity before and after, on this UTF-8 text.")
    ] = None,
    budget: Budget = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a copy of a checkpoint whose experts are read in one piece, or (--experts) are quantised and smaller."""
    check_model(model)
    if wrong := size_problem(max_shard_size):
        raise ConfigError(f"--max-shard-size: size {max_shard_size!r} is not usable: {wrong}; write it as 5GB or 5GiB")
    _check_together(experts, verify, measure, budget)
    config, code = settings_of_flags(None, budget=budget), {"trust_remote_code": trust_remote_code}
    check_new(out)
    if measure is not None:
        from ...plan.forecast import of_outline, read_outline
        from .perplexity import measure_text, read_text, tokenise_text

        pieces = tokenise_text(model, read_text(measure), **code)
        # It raises for a budget that is too small, which must not cost a copy.
        of_outline(read_outline(model, trust_remote_code=trust_remote_code), config)
    try:
        if experts is None:
            from ...pack import pack_checkpoint

            written = pack_checkpoint(model, out, max_shard_size=max_shard_size, verify=verify, **code)
        else:
            from ...quantise import quantise_checkpoint

            written = quantise_checkpoint(model, out, experts, max_shard_size=max_shard_size, **code)
    except KeyboardInterrupt:
        fail_with(f"interrupted; {out} was not written, and nothing was left behind", INTERRUPTED)
    typer.echo(str(written))
    if measure is not None:
        for name, folder in (("before", model), (f"{experts}", written)):
            typer.echo(f"{name}: {measure_text(folder, pieces, config, **code)}")


def _check_together(experts: str | None, verify: str, measure: Path | None, budget: str | None) -> None:
    if experts is not None and verify != "sample":
        raise ConfigError("--verify is for packing without --experts; with it three rows a layer are always read back")
    if measure is not None and experts is None:
        raise ConfigError(
            "--measure needs --experts: otherwise the copy computes the same, and has the same perplexity"
        )
    if budget is not None and measure is None:
        raise ConfigError("--budget is what a model may hold while --measure runs it; nothing runs here without that")
    if measure is not None and not measure.is_file():
        raise ConfigError(
            f"--measure {measure}: {'not a file' if measure.exists() else 'no such file'}; give a UTF-8 text"
        )
