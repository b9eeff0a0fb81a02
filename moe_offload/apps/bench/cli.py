"""moe-offload bench."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ...config.settings import FILE_VARIABLE
from ..options.checks import check_inputs, check_output, residency_share, settings
from ..options.ending import or_exit
from ..options.flags import ConfigFile, whole


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, Hub repository, or synthetic:NAME: random weights in a real architecture "
            "(qwen3-30b-a3b, gpt-oss-20b, tiny), written into the cache folder.",
            show_default=False,
        ),
    ],
    budget: Annotated[str | None, typer.Option("--budget", help="All the model may hold, as in run.")] = None,
    residency: Annotated[
        list[str] | None,
        typer.Option(
            "--residency", help="Instead of --budget: the share of experts kept, as 25%, or several, as 25%,50%."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where models compute: cpu (experts on disk) or cuda (experts in RAM).")
    ] = "cpu",
    layers: Annotated[int | None, typer.Option("--layers", help="Layers of a synthetic model.", **whole(1))] = None,
    routing: Annotated[
        Path | None, typer.Option("--routing", help="Replay the expert ids of this trace (.npz) for every side.")
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option("--prompt", help="A text file for the prompt; random tokens without one.")
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
            help="What to compare, by commas; accelerate@50% at that residency alone.",
            show_default="cpu: resident,ours,accelerate,mmap; cuda: resident,ours,ours-host,accelerate",
        ),
    ] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Ours reads a copy that moe-offload pack has made.")] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Where synthetic checkpoints and temporary files go.")
    ] = None,
    config_file: ConfigFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")] = None,
) -> None:
    """Measure offloading beside the resident model, accelerate's offload, plain mmap, and the disk or link itself."""
    wanted = settings(config_file, budget=budget)
    listed = [share for text in residency or [] for share in text.split(",")]
    shares = [residency_share(share) for share in listed]
    check_output("--json", json_file)
    if not model.startswith("synthetic:") and layers is None:  # with --layers it is refused below, whatever it is
        check_inputs(model, wanted)
    from .command import scratch_folder, workload, write_json
    from .run import bench as run_bench
    from .sides.side import SIDES
    from .table import table

    if config_file is not None:
        os.environ[FILE_VARIABLE] = str(config_file.resolve())  # for the process of each side, too
    work = or_exit(
        lambda: workload(
            model,
            device=device,
            budget=budget,
            residency=shares,
            layers=layers,
            routing=routing,
            prompt=prompt,
            cache=cache,
            packed=packed,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            requests=requests,
        )
    )
    for plan in work.plans.values():
        typer.echo(str(plan), err=True)
    named = list(SIDES[device]) if sides is None else [side.strip() for side in sides.split(",") if side.strip()]

    def keep(result: dict[str, Any]) -> None:
        if json_file is not None:
            or_exit(lambda: write_json(result, json_file))

    result = or_exit(
        lambda: run_bench(work, named, scratch_folder(cache), lambda line: typer.echo(line, err=True), keep)
    )
    typer.echo(table(result))
