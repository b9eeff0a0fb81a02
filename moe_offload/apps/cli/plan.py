"""moe-offload plan."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

if TYPE_CHECKING:
    from ...checkpoint.outline import Outline


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
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """What fits where, and the smallest budget that works. Reads headers only.

    Devices need not be there: --device-map '{"": 0}' --max-memory '{0: 8GB, cpu: 60GiB}' plans for a GPU.
    Exit code 3 if it does not fit; --json then prints the smallest budget that would.
    """
    wanted = settings_of_flags(
        config_file, budget=budget, device_map=device_map, max_memory=max_memory, profile=profile, kv_tokens=context
    )
    check_model(model, weights=False)
    from ...plan.forecast import of_outline, read_outline

    outline = read_outline(model, dtype, trust_remote_code)
    try:
        found = of_outline(outline, wanted)
    except BudgetError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({**_what_would_fit(model, outline, wanted), **error_json(error)}))
        fail_with(str(error), exit_code(error))
    if as_json:
        facts = {"fits": True, **found.to_dict()}
        typer.echo(json.dumps({**facts, **({"explain": found.explain()} if explain else {})}))
    else:
        typer.echo(f"{found}\n\n{found.explain()}" if explain else str(found))


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
