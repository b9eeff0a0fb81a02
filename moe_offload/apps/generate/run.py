"""moe-offload run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import OffloadError
from ..options.checks import check_inputs, check_output, live_or_default, settings
from ..options.ending import fail, or_exit
from ..options.flags import Budget, ConfigFile, DeviceMapOption, Live, MaxMemory, Model, PrewarmWith, SaveProfile, whole


def run(
    model: Model,
    budget: Budget = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemory = None,
    config_file: ConfigFile = None,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; - reads standard input.")] = "The ",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="How many tokens to generate.", **whole(1))
    ] = 64,
    profile_in: PrewarmWith = None,
    profile_out: SaveProfile = None,
    trace_out: Annotated[
        Path | None, typer.Option("--trace-out", help="Save which experts were asked for here (.npz, for simulate).")
    ] = None,
    timeline_out: Annotated[
        Path | None, typer.Option("--timeline-out", help="Save what happened when here (.json, for ui.perfetto.dev).")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Save what the run was like here (.json, for moe-offload report).")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", help="Serve Prometheus metrics on this port of 127.0.0.1.", **whole(1, 65535)),
    ] = None,
    live: Live = None,
    compile: Annotated[
        str | None,
        typer.Option(
            "--compile", help="graph: the model's own kernels; inductor: compile them; auto.", show_default="auto"
        ),
    ] = None,
) -> None:
    """Generate text greedily inside a budget; the text is that of the unmodified model."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        fail("the prompt is empty: give --prompt some text", 2)
    for flag, out in (
        ("--profile-out", profile_out),
        ("--trace-out", trace_out),
        ("--timeline-out", timeline_out),
        ("--report", report),
    ):
        check_output(flag, out)
    if metrics_port is not None:
        from ...observe.metrics import check

        or_exit(lambda: check(metrics_port))
    wanted = settings(
        config_file,
        budget=budget,
        device_map=device_map,
        max_memory=max_memory,
        profile=profile_in,
        compile=compile,
        live=live_or_default(live, config_file),
    )
    check_inputs(model, wanted)
    from ...api import from_pretrained
    from .tokenizer import load_tokenizer

    loaded: Any = or_exit(lambda: from_pretrained(model, config=wanted))
    with loaded.moe_offload as handle:
        typer.echo(str(handle.plan), err=True)
        if metrics_port is not None:
            typer.echo(f"metrics: {or_exit(lambda: handle.serve_metrics(metrics_port))}", err=True)
        tokenizer = or_exit(lambda: load_tokenizer(model))
        if trace_out is not None or report is not None:
            handle.start_trace()
        if timeline_out is not None:
            handle.start_timeline()
        interrupted = False
        try:
            typer.echo(or_exit(lambda: _generate(loaded, tokenizer, text, max_new_tokens), code=1))
        except KeyboardInterrupt:
            interrupted = True
            typer.echo("moe-offload: interrupted", err=True)
        ended_s = None if report is None else handle.recorded_s()
        typer.echo(handle.summary(), err=True)
        if profile_out is not None:
            saved = or_exit(lambda: handle.save_profile(profile_out), code=1)
            typer.echo(f"profile saved to {saved}", err=True)
        if trace_out is not None:
            saved = or_exit(lambda: handle.save_trace(trace_out), code=1)
            typer.echo(f"trace saved to {saved}", err=True)
        if timeline_out is not None:
            saved = or_exit(lambda: handle.save_timeline(timeline_out), code=1)
            typer.echo(f"timeline saved to {saved}; ui.perfetto.dev opens it", err=True)
        if report is not None:
            from ..report.collect import record_of

            name = None if wanted.profile is None else Path(wanted.profile).name
            saved = or_exit(lambda: record_of(handle, model=model, profile=name, ended_s=ended_s).save(report), code=1)
            typer.echo(f"run saved to {saved}; moe-offload report {saved} makes a page of it", err=True)
        if interrupted:
            raise typer.Exit(130)


def _generate(model: Any, tokenizer: Any, text: str, max_new_tokens: int) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise OffloadError("the prompt is empty: give --prompt some text")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
