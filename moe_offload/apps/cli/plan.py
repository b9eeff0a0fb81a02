"""moe-offload plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config.launched import is_first
from ...config.settings import OffloadConfig
from ...config.sizes import parse_size
from ...errors import BudgetError, ConfigError
from ..options.checks import check_model, settings_of_flags
from ..options.ending import error_json, exit_code, fail_with
from ..options.flags import (
    Budget,
    ConfigFile,
    Context,
    DeviceMapOption,
    Dtype,
    Json,
    MaxMemory,
    Model,
    ProfileIn,
    TrustRemoteCode,
)
from ..options.numbers import whole
from .plan_ranks import NoPlanError, RankPlans, budgets_of_ranks, plan_ranks, world_to_plan

if TYPE_CHECKING:
    from ...checkpoint.outline import Outline
    from ...plan.forecast import Forecast


def plan(
    model: Model,
    budget: Budget = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemory = None,
    profile: ProfileIn = None,
    context: Context = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add which rule puts what where, and what is not offloaded and why.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            help="Processes that share the experts (docs/several-machines.md): what each holds.",
            **whole(1, 4096),
        ),
    ] = None,
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """What fits where, and the smallest budget that works. Reads headers only.

    Devices need not be there: --device-map '{"": 0}' --max-memory '{0: 8GB, cpu: 60GiB}' plans for a GPU.
    With --ranks N a budget by commas is one for each of them.
    Exit code 3 if it does not fit; --json then prints the smallest budget that would.
    """
    world = world_to_plan(ranks)
    wanted = [
        settings_of_flags(
            config_file, budget=one, device_map=device_map, max_memory=max_memory, profile=profile, kv_tokens=context
        )
        for one in budgets_of_ranks(budget, world)
    ]
    check_model(model, weights=False)
    if not is_first():
        return
    from ...plan.forecast import read_outline

    read, without = partial(read_outline, model, dtype, trust_remote_code), partial(_what_would_fit, model)
    try:
        found = plan_ranks(read, wanted, without) if world > 1 else _plan_alone(read(), wanted[0], without)
    except NoPlanError as none:
        if not as_json:
            raise none.error from None
        typer.echo(json.dumps({**none.facts, **error_json(none.error)}))
        fail_with(str(none.error), exit_code(none.error))
    if as_json:
        typer.echo(json.dumps({"fits": True, **found.to_dict(), **({"explain": found.explain()} if explain else {})}))
    else:
        typer.echo(f"{found}\n\n{found.explain()}" if explain else str(found))


def _plan_alone(
    outline: Outline, wanted: OffloadConfig, without: Callable[[Outline, OffloadConfig], dict[str, Any]]
) -> Forecast | RankPlans:
    from ...plan.forecast import of_outline

    try:
        return of_outline(outline, wanted)
    except BudgetError as error:
        raise NoPlanError(error, without(outline, wanted)) from error


def _what_would_fit(model: str, outline: Outline, wanted: OffloadConfig) -> dict[str, Any]:
    """The keys of a plan that there is none of: the budget that was asked for, and on one device the smallest."""
    from ...plan.forecast import of_outline

    most = of_outline(outline, dataclasses.replace(wanted, budget=2**60, device_map="disk", max_memory=None))
    try:
        asked = None if wanted.budget is None else parse_size(wanted.budget)
    except ConfigError:  # a share of what is free
        asked = None
    return {
        "fits": False,
        "model": model,
        "source": most.source,
        "budget": asked,
        "floor": most.floor_bytes,
        "resident": most.resident_bytes,
    }
