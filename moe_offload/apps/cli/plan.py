"""moe-offload plan."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..options.checks import check_inputs, settings
from ..options.ending import or_exit
from ..options.flags import Budget, ConfigFile, Context, DeviceMapOption, Json, MaxMemory, Model, ProfileIn


def plan(
    model: Model,
    budget: Budget = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemory = None,
    profile: ProfileIn = None,
    context: Context = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add which rule puts what where, and what is not offloaded and why.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """What fits where, and the smallest budget that works. Reads headers only; exit code 1 if it cannot fit.

    Devices need not be there: --device-map '{"": 0}' --max-memory '{0: 8GB, cpu: 60GiB}' plans for a GPU.
    """
    wanted = settings(
        config_file, budget=budget, device_map=device_map, max_memory=max_memory, profile=profile, kv_tokens=context
    )
    check_inputs(model, wanted)
    from ...plan.forecast import forecast

    found = or_exit(lambda: forecast(model, config=wanted))
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), **({"explain": found.explain()} if explain else {})}))
    else:
        typer.echo(f"{found}\n\n{found.explain()}" if explain else str(found))
