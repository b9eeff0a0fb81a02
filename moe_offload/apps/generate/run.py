"""moe-offload run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ...cache.counters import Counters
from ...config.launched import is_first
from ...config.settings import DEFAULT, OffloadConfig, find_origins
from ...config.usage import profile_path
from ..options.checks import check_model, check_output, check_tokenizer
from ..options.ending import INTERRUPTED
from ..options.flags import Model, SaveProfile, SaveReport, SaveTimeline, SaveTrace, System
from ..options.groups import ModelFlags, SamplingFlags, flatten_groups
from ..options.numbers import whole
from .on_ranks import common_seed, lines_of_ranks, refuse_for_ranks
from .prompt import encode_chat, encode_text, read_prompt, room_for_answer

DEFAULT_PROMPT = "The "


@flatten_groups
def run(
    model: Model,
    flags: ModelFlags,
    sampling: SamplingFlags,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help='Text to continue; - reads standard input. Without one: "The ".'),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the prompt from this UTF-8 file.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: answer it, with the model's chat template.")
    ] = False,
    system: System = None,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk-size",
            help="Tokens of the prompt to read at a time; without it as many as the budget has room for.",
            **whole(1),
        ),
    ] = None,
    save_profile: SaveProfile = None,
    save_trace: SaveTrace = None,
    save_timeline: SaveTimeline = None,
    save_report: SaveReport = None,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", help="Serve Prometheus metrics on this port of 127.0.0.1.", **whole(1, 65535)),
    ] = None,
) -> None:
    """Generate text inside a budget, as it comes; it is the text of the unmodified model.

    Greedy, unless --temperature, --top-p, --top-k or --seed asks for sampling. Ctrl-C ends the text and keeps it.
    """
    outputs = Outputs(save_profile, save_trace, save_timeline, save_report)
    refuse_for_ranks(prompt=prompt, save_trace=save_trace, save_report=save_report)
    text = read_prompt(prompt, file, DEFAULT_PROMPT)
    outputs.check()
    if metrics_port is not None and is_first():
        from ...observe.metrics import check_port

        check_port(metrics_port)
    wanted = flags.settings()
    check_model(model, revision=flags.revision)
    check_tokenizer(model)
    from ...api import from_pretrained
    from ...plan.weights import planned_context
    from .tokenizer import load_tokenizer, read_longest_context

    flags.set_threads()
    longest = read_longest_context(model, **flags.hub())  # first: of a repository that is not there, this says so
    tokenizer = load_tokenizer(model, **flags.hub())
    told = [] if system is None else [{"role": "system", "content": system}]
    talks = chat or system is not None
    inputs = (
        encode_chat(tokenizer, [*told, {"role": "user", "content": text}]) if talks else encode_text(tokenizer, text)
    )
    prompt_tokens = inputs["input_ids"].shape[-1]
    context = given_context(wanted, flags)
    new_tokens = _say_room(prompt_tokens, longest, sampling.max_new_tokens, context)
    if context is None:
        wanted = dataclasses.replace(wanted, kv_tokens=max(prompt_tokens + new_tokens, wanted.kv_tokens))
    loaded: Any = from_pretrained(model, config=wanted, **flags.loading(model))
    with loaded.moe_offload as handle:
        new_tokens = _say_room(prompt_tokens, longest, new_tokens, planned_context(loaded, wanted))
        typer.echo(str(handle.plan), err=True)
        if metrics_port is not None and is_first():
            typer.echo(f"metrics: {handle.serve_metrics(metrics_port)}", err=True)
        outputs.start(handle)
        how = {**sampling.generate_kwargs(), "max_new_tokens": new_tokens}
        if prefill_chunk_size is not None:
            how["prefill_chunk_size"] = prefill_chunk_size
        seed = common_seed(handle, sampling.seed, how)
        complete = write_answer(loaded, tokenizer, inputs, how, seed, skip_prompt=talks)
        if complete or handle.ranks is None:  # ranks that were interrupted are not in step any more
            outputs.save(handle, model, wanted)
    if not complete:
        raise typer.Exit(INTERRUPTED)


def _say_room(prompt_tokens: int, longest: int | None, wanted: int, context: int | None) -> int:
    """`room_for_answer`, which is said where it is less than was `wanted`."""
    room = room_for_answer(prompt_tokens, longest, wanted, context)
    if room < wanted:
        typer.echo(f"moe-offload: {room} tokens are generated at most: the context ends there", err=True)
    return room


def write_answer(
    model: Any, tokenizer: Any, inputs: Any, how: dict[str, Any], seed: int | None, *, skip_prompt: bool
) -> bool:
    """Generate onto standard output, then one line about it on standard error. False if Ctrl-C has ended it."""
    from transformers import set_seed

    from .clock import Clock
    from .speed import speed_line
    from .streaming import Streamer

    if seed is not None:
        set_seed(seed)
    handle = model.moe_offload
    before, complete = Counters.total(handle.stats_of_ranks()), True
    with Clock() as clock:
        streamer = Streamer(tokenizer, write_now, clock, skip_prompt=skip_prompt)
        try:
            generate_into(streamer, model, inputs, how)
        except KeyboardInterrupt:
            complete = False
            streamer.end()
    write_now("\n")
    if not complete:
        typer.echo("moe-offload: interrupted", err=True)
    ranks = handle.stats_of_ranks() if complete else [handle.stats()]
    typer.echo(speed_line(streamer, before, Counters.total(ranks)), err=True)
    if complete:
        for line in lines_of_ranks(handle, ranks):
            typer.echo(line, err=True)
    return complete


def generate_into(streamer: Any, model: Any, inputs: Any, how: dict[str, Any]) -> None:
    """`model.generate`, which cannot stream what several beams compete for: their text comes at the end."""
    if (model.generation_config.num_beams or 1) == 1:
        model.generate(**inputs, **how, streamer=streamer)
        return
    tokens = model.generate(**inputs, **how)[0]
    streamer.put(inputs["input_ids"])
    streamer.put(tokens[inputs["input_ids"].shape[-1] :])
    streamer.end()


def write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def given_context(wanted: OffloadConfig, flags: ModelFlags) -> int | None:
    """For how many tokens of prompt and answer the budget was told to keep room; None where nobody has said."""
    said = flags.context is not None or find_origins(flags.config_file)["kv_tokens"] != DEFAULT
    return wanted.kv_tokens or None if said else None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files that a run writes beside its text."""

    profile: Path | None
    trace: Path | None
    timeline: Path | None
    report: Path | None

    def check(self) -> None:
        """Raises ConfigError for one that cannot be written."""
        for field in dataclasses.fields(self) if is_first() else ():
            check_output(f"--save-{field.name}", getattr(self, field.name))

    def start(self, handle: Any) -> None:
        if self.trace is not None or self.report is not None:
            handle.start_trace()
        if self.timeline is not None and is_first():
            handle.start_timeline()

    def save(self, handle: Any, model: str, wanted: OffloadConfig) -> None:
        """Write each that was asked for, and say where."""
        for line in self._save(handle, model, wanted):
            typer.echo(line, err=True)

    def _save(self, handle: Any, model: str, wanted: OffloadConfig) -> Iterator[str]:
        ended_s = None if self.report is None else handle.recorded_s()
        if self.profile is not None:
            yield f"profile saved to {handle.save_profile(self.profile)}"
        if self.trace is not None:
            yield f"trace saved to {handle.save_trace(self.trace)}"
        if self.timeline is not None and is_first():
            yield f"timeline saved to {handle.save_timeline(self.timeline)}; ui.perfetto.dev opens it"
        if self.report is not None:
            from ..report.collect import collect_run

            path, remembered = profile_path(wanted.profile), handle.remembered
            name = "of earlier runs" if remembered is not None else None if path is None else Path(path).name
            saved = collect_run(handle, model=model, profile=name, ended_s=ended_s).save(self.report)
            yield f"run saved to {saved}; moe-offload report {saved} makes a page of it"
