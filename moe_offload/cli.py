"""The command line: moe-offload plan | run | pack | bench | simulate | families.

What a person asked for goes to standard output (a plan, generated text, a table); what happened on the way goes to
standard error. A flag, size, path or profile that cannot work is one line and exit code 2; a budget below the floor, or
a family that differs, is exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from .errors import BudgetError, OffloadError

app = typer.Typer(
    name="moe-offload",
    help="Run Mixture-of-Experts models that do not fit: hot experts stay, the rest stream in just in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")
Model = Annotated[str, typer.Argument(help="Checkpoint folder, or the name of a Hub repository.", show_default=False)]
Budget = Annotated[
    str,
    typer.Option("--budget", help="All the model may hold: 8GB, 8GiB, 50% of free memory, a number of bytes, auto."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def plan(model: Model, budget: Budget = "auto", as_json: Json = False) -> None:
    """What fits where, and the smallest budget that works. Reads headers only, no weights."""
    from .api import make_plan

    found = _or_exit(lambda: make_plan(model, budget))
    if as_json:
        rows = dict(found.rows())
        facts = {"budget": found.budget_bytes, "floor": found.floor_bytes, "residency": found.residency}
        typer.echo(json.dumps({**facts, "slots": list(found.slots), "bytes": rows}))
    else:
        typer.echo(str(found))


@app.command()
def run(
    model: Model,
    budget: Budget = "auto",
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; - reads standard input.")] = "The ",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="How many tokens to generate.")] = 64,
    profile_in: Annotated[
        Path | None, typer.Option("--profile-in", help="Pre-warm the slots with this activation profile.")
    ] = None,
    profile_out: Annotated[
        Path | None, typer.Option("--profile-out", help="Save the activation profile of this run here.")
    ] = None,
    compile: Annotated[
        str, typer.Option("--compile", help="graph: the model's own kernels; inductor: compile them; auto.")
    ] = "auto",
) -> None:
    """Generate text greedily inside a budget; the text is that of the unmodified model."""
    from .api import from_pretrained

    text = sys.stdin.read() if prompt == "-" else prompt
    if profile_out is not None and not profile_out.resolve().parent.is_dir():
        _fail(f"--profile-out {profile_out}: its folder does not exist", 2)
    loaded: Any = _or_exit(
        lambda: from_pretrained(model, budget, profile=profile_in, config={"compile": compile}), (OffloadError,)
    )
    with loaded.moe_offload as handle:
        typer.echo(str(handle.plan), err=True)
        tokenizer = _or_exit(lambda: _tokenizer(model))
        interrupted = False
        try:
            typer.echo(_or_exit(lambda: _generate(loaded, tokenizer, text, max_new_tokens), code=1))
        except KeyboardInterrupt:
            interrupted = True
            typer.echo("moe-offload: interrupted", err=True)
        typer.echo(str(handle).splitlines()[-1], err=True)
        if profile_out is not None:
            saved = _or_exit(lambda: handle.save_profile(profile_out), code=1)
            typer.echo(f"profile saved to {saved}", err=True)
        if interrupted:
            raise typer.Exit(130)


@app.command()
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
        str | None, typer.Option("--residency", help="Instead of --budget: the share of experts kept, as 25%.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers of a synthetic model.")] = None,
    routing: Annotated[
        Path | None, typer.Option("--routing", help="Replay the expert ids of this trace (.npz) for every side.")
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option("--prompt", help="A text file for the prompt; random tokens without one.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens decoded after the first.")] = 32,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests measured, after one to warm up.")] = 3,
    sides: Annotated[
        str, typer.Option("--sides", help="What to compare, by commas.")
    ] = "resident,ours,accelerate,mmap",
    packed: Annotated[bool, typer.Option("--packed", help="Ours reads a copy that moe-offload pack has made.")] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Where synthetic checkpoints and temporary files go.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")] = None,
) -> None:
    """Measure offloading beside the resident model, accelerate's disk offload, plain mmap, and the disk itself."""
    from .bench.command import scratch_folder, workload, write_json
    from .bench.run import bench as run_bench
    from .bench.table import table

    work = _or_exit(
        lambda: workload(
            model,
            budget=budget,
            residency=residency,
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
    typer.echo(str(work.plan), err=True)
    wanted = [side.strip() for side in sides.split(",") if side.strip()]
    result = _or_exit(lambda: run_bench(work, wanted, scratch_folder(cache), lambda line: typer.echo(line, err=True)))
    typer.echo(table(result))
    if json_file is not None:
        _or_exit(lambda: write_json(result, json_file))


@app.command()
def pack(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The new folder to write; must not exist yet.", show_default=False)],
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file, unless one layer is.")] = "5GB",
    verify: Annotated[
        str, typer.Option("--verify", help="Rows to read back and compare: sample (three a layer), all, none.")
    ] = "sample",
) -> None:
    """Write a copy of a checkpoint whose experts are read in one piece and without conversion."""
    from .pack import pack_checkpoint

    try:
        written = _or_exit(lambda: pack_checkpoint(model, out, max_shard_size=max_shard_size, verify=verify))
    except KeyboardInterrupt:
        _fail(f"interrupted; {out} was not written, and nothing was left behind", 130)
    typer.echo(str(written))


@app.command()
def simulate(
    traces: Annotated[list[Path], typer.Argument(help="Traces (.npz); what is none is skipped.", show_default=False)],
    policies: Annotated[
        str, typer.Option("--policies", help="By commas: default, lru, decayed_lfu:16, belady, ...; or all.")
    ] = "all",
    capacity: Annotated[str, typer.Option("--capacity", help="Shares of a layer's experts, by commas.")] = "25%",
    start: Annotated[
        str, typer.Option("--start", help="warm: the cache outlives a request; cold: it does not; or both.")
    ] = "warm",
    pooled: Annotated[bool, typer.Option("--pooled", help="One cache for all layers.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here, too.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write hit rate over capacity here, as PNG.")] = None,
) -> None:
    """Replay traces through the cache: hit rates of policies at several capacities, beside Belady's MIN."""
    from .simulate.command import run as run_simulation

    typer.echo(
        _or_exit(
            lambda: run_simulation(
                traces,
                policies=policies,
                capacities=capacity,
                starts=start,
                pooled=pooled,
                json_file=json_file,
                plot=plot,
                note=lambda line: typer.echo(f"moe-offload: {line}", err=True),
            )
        )
    )


@app.command()
def families(
    names: Annotated[list[str] | None, typer.Argument(help="Families to check; all when none is named.")] = None,
    compile: Annotated[str, typer.Option("--compile", help="graph, or inductor (minutes per family).")] = "graph",
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Every implementation, dtype, batch, cache and budget, not a slice of them."),
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes to spread the families over.")] = (
        os.cpu_count() or 1
    ),
    as_json: Json = False,
) -> None:
    """Build a tiny random model of every MoE family of the installed transformers; run it resident and offloaded."""
    from .families.report import run_families

    if not run_families(
        names or [], compile=compile, matrix=matrix, as_json=as_json, jobs=jobs, fail=lambda m: _fail(m, 2)
    ):
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    app()


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise OffloadError(f"{model}: cannot load its tokenizer: {str(error).splitlines()[0]}") from error


def _generate(model: Any, tokenizer: Any, text: str, max_new_tokens: int) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise OffloadError("the prompt is empty: give --prompt some text")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _or_exit(work: Callable[[], T], errors: tuple[type[Exception], ...] = (OffloadError,), code: int = 2) -> T:
    try:
        return work()
    except errors as error:
        _fail(str(error), 1 if isinstance(error, BudgetError) else code)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"moe-offload: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
