"""moe-offload profile record | inspect | merge | diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...errors import ConfigError, ProfileError
from ..options.checks import check_model, check_output, residency_share, settings_of_flags
from ..options.ending import Command
from ..options.flags import ConfigFile, Json, Model, TrustRemoteCode
from ..options.groups import summary_line
from ..options.lists import split_list
from ..options.numbers import whole

app = typer.Typer(
    help="Activation profiles: which experts a workload uses, to pre-warm the slots with.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Out = Annotated[Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)]
ProfileFile = Annotated[Path, typer.Argument(help="A profile.", show_default=False)]


def record(
    model: Model,
    texts: Annotated[
        list[Path], typer.Argument(help="UTF-8 texts of the workload; - is standard input.", show_default=False)
    ],
    out: Out,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="All the model may hold; without it the model runs as plain transformers."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Stop after so many tokens.", **whole(1))
    ] = None,
    meta: Annotated[list[str] | None, typer.Option("--meta", help="key=value, kept in the profile.")] = None,
    config_file: ConfigFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a model over texts and save which experts they use."""
    from .texts import profile_texts

    check_output("--out", out)
    pairs = [entry.partition("=") for entry in meta or []]
    if bad := [key + equals for key, equals, _ in pairs if not key or not equals]:
        raise ConfigError(f"--meta {bad[0]!r}: write key=value")
    facts = {key: value for key, _, value in pairs}
    wanted = settings_of_flags(config_file, budget=budget)
    check_model(model)
    made = profile_texts(
        model, texts, max_tokens=max_tokens, meta=facts, config=wanted, trust_remote_code=trust_remote_code
    )
    made.save(out)
    typer.echo(f"{made.tokens} tokens, {made.fingerprint.layers} layers: saved to {out}")


def inspect(
    profile: ProfileFile,
    residency: Annotated[
        str | None,
        typer.Option("--residency", help="Share of the experts that is resident: what the profile is worth then."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="With --budget: the checkpoint to plan for.")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Instead of --residency: all the model may hold; needs --model.")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Replay this trace with and without it.")] = None,
    as_json: Json = False,
) -> None:
    """How skewed a workload is, layer by layer, and what pre-warming with it would bring."""
    from ...observe.profile import Profile
    from ...observe.trace import Trace
    from .tables import inspect_profile as look
    from .tables import inspect_table

    if (budget is None) != (model is None) or (budget and residency):
        raise ConfigError("give --residency, or --budget together with --model")
    if trace is not None and not (budget or residency):
        raise ConfigError("--trace needs to know the slots: give --residency, or --budget with --model")
    loaded = Profile.load(profile)
    slots = _slots(loaded, residency, model, budget)
    found = look(loaded, slots, None if trace is None else Trace.load(trace))
    typer.echo(json.dumps(found) if as_json else inspect_table(found))


def merge(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles of one model.", show_default=False)],
    out: Out,
    weights: Annotated[str | None, typer.Option("--weights", help="One each, by commas; 1 by default.")] = None,
) -> None:
    """One profile of several workloads: counts are added, times their weights."""
    from ...observe.profile import Profile
    from ...observe.profile import merge_profiles as merged

    check_output("--out", out)
    listed = [] if weights is None else split_list("--weights", weights, "1,0.5")
    try:
        numbers = [float(weight) for weight in listed] or None
    except ValueError:
        raise ConfigError(f"--weights {weights!r}: write one number a profile, by commas") from None
    made = merged([Profile.load(path) for path in profiles], numbers)
    made.save(out)
    typer.echo(f"{len(profiles)} profiles, {made.tokens} tokens: saved to {out}")


def diff(a: ProfileFile, b: ProfileFile, as_json: Json = False) -> None:
    """How far apart two workloads are, layer by layer."""
    from ...observe.profile import Profile
    from .tables import compare_profiles as compare
    from .tables import diff_table

    found = compare(Profile.load(a), Profile.load(b))
    typer.echo(json.dumps(found) if as_json else diff_table(found))


for command in (record, inspect, merge, diff):
    app.command(short_help=summary_line(command), cls=Command)(command)


def _slots(profile: object, residency: str | None, model: str | None, budget: str | None) -> list[int] | None:
    from ...observe.profile import Profile
    from .tables import slots_at

    assert isinstance(profile, Profile)
    if residency is not None:
        return slots_at(profile, residency_share(residency))
    if model is None:
        return None
    settings_of_flags(None, budget=budget)
    check_model(model)
    from ...plan.forecast import make_plan

    plan = make_plan(model, budget)
    if [layer.num_experts for layer in plan.layers] != profile.fingerprint.experts:
        raise ProfileError(f"the profile is of another model than {model}: its layers have other numbers of experts")
    return list(plan.slots)
