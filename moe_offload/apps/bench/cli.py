"""moe-offload bench."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ...config.settings import ENVIRONMENT_PREFIX, FILE_VARIABLE
from ...errors import ConfigError
from ..options.checks import check_cuda, check_model, check_output, residency_share, settings_of_flags
from ..options.flags import Budget, Compute, ConfigFile, Json, TrustRemoteCode
from ..options.lists import split_list
from ..options.numbers import one_of, whole
from .architectures import PREFIX, sizes_of
from .sides.names import DEFAULT, LLAMA, check_llama, check_sides

DEFAULT_RESIDENCY = 0.25


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, Hub repository, or synthetic:NAME: random weights in a real architecture "
            "(qwen3-30b-a3b, gpt-oss-20b, tiny), written into the cache folder.",
            show_default=False,
        ),
    ],
    budget: Budget = None,
    residency: Annotated[
        list[str] | None,
        typer.Option(
            "--residency",
            help="Instead of --budget: share of the experts that is resident, 25% without a flag; several by commas.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="Where models compute: cpu (experts on disk) or cuda (experts in RAM).",
            **one_of("cpu", "cuda"),
        ),
    ] = "cpu",
    layers: Annotated[int | None, typer.Option("--layers", help="Layers of a synthetic model.", **whole(1))] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            help="Experts of a synthetic model in mxfp4, int4 or fp8, instead of bfloat16.",
            **one_of("mxfp4", "int4", "fp8"),
        ),
    ] = None,
    routing: Annotated[
        Path | None, typer.Option("--routing", help="Replay the expert ids of this trace (.npz) for every side.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Read the prompt from this UTF-8 file; random tokens without one.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt.", **whole(1))] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens decoded after the first.", **whole(1))] = 32,
    requests: Annotated[
        int, typer.Option("--requests", help="Requests measured, after one to warm up.", **whole(1))
    ] = 3,
    sides: Annotated[
        str | None,
        typer.Option(
            "--sides",
            help="What to compare, by commas; accelerate@50% at that residency alone. Without it, on a CPU "
            "resident,ours,accelerate,mmap, and llama.cpp is the rival to name; on a GPU "
            "resident,ours,ours-host,accelerate.",
        ),
    ] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Ours reads a copy that moe-offload pack has made.")] = False,
    compute: Compute = None,
    trust_remote_code: TrustRemoteCode = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Where synthetic checkpoints and temporary files go.")
    ] = None,
    config_file: ConfigFile = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The JSON file to write, too.")] = None,
    as_json: Json = False,
) -> None:
    """Measure offloading beside the resident model, accelerate's offload, plain mmap, and the disk or link itself."""
    settings_of_flags(config_file, budget=budget, compute=compute)
    if model.startswith(PREFIX):
        sizes_of(model.removeprefix(PREFIX), layers)
        if trust_remote_code:
            raise ConfigError(f"--trust-remote-code is for a checkpoint; {model} brings no code along")
    elif layers is not None:
        raise ConfigError(f"--layers is for {PREFIX}NAME; {model} has the layers it has")
    elif experts is not None:
        raise ConfigError(f"--experts is for {PREFIX}NAME; to quantise those of {model}, moe-offload pack --experts")
    else:
        check_model(model)
    for flag, read in (("--routing", routing), ("--file", file)):
        if read is not None and not read.is_file():
            raise ConfigError(f"{flag} {read}: no such file")
    if budget is not None and residency:
        raise ConfigError("give either --budget (8GB) or --residency (25%), not both")
    listed = [share for text in residency or [] for share in split_list("--residency", text, "25%,50%")]
    shares = [residency_share(share) for share in listed]
    if budget is None and not shares:
        shares = [DEFAULT_RESIDENCY]
    check_output("--out", out)
    named = DEFAULT[device] if sides is None else tuple(split_list("--sides", sides, "resident,ours"))
    check_sides(named, device, [budget] if budget is not None else [f"{share * 100:g}%" for share in shares])
    if device == "cuda":
        check_cuda()
    if any(side.partition("@")[0] == LLAMA for side in named):
        check_llama(model, experts, routing)
    from .command import make_workload, scratch_folder, write_json
    from .run import run_bench as run_bench
    from .table import format_table

    if config_file is not None:
        os.environ[FILE_VARIABLE] = str(config_file.resolve())  # for the process of each side, too
    if compute is not None:
        os.environ[ENVIRONMENT_PREFIX + "COMPUTE"] = compute
    work = make_workload(
        model,
        device=device,
        budget=budget,
        residency=shares,
        layers=layers,
        routing=routing,
        prompt=file,
        cache=cache,
        packed=packed,
        experts=experts,
        trust_remote_code=trust_remote_code,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests=requests,
    )
    for plan in work.plans.values():
        typer.echo(str(plan), err=True)

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            write_json(result, out)

    result = run_bench(work, named, scratch_folder(cache), lambda line: typer.echo(line, err=True), keep)
    typer.echo(json.dumps(result) if as_json else format_table(result))
