"""moe-offload plan."""

from __future__ import annotations

import json

import typer

from .options import Budget, ConfigFile, Json, Model, or_exit, settings


def plan(model: Model, budget: Budget = None, config_file: ConfigFile = None, as_json: Json = False) -> None:
    """What fits where, and the smallest budget that works. Reads headers only, no weights."""
    from ..api import make_plan

    wanted = settings(config_file, budget=budget)
    found = or_exit(lambda: make_plan(model, config=wanted))
    if as_json:
        rows = dict(found.rows())
        facts = {"budget": found.budget_bytes, "floor": found.floor_bytes, "residency": found.residency}
        typer.echo(json.dumps({**facts, "slots": list(found.slots), "bytes": rows}))
    else:
        typer.echo(str(found))
