"""moe-offload estimate."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from ...config.settings import OffloadConfig
from ...config.sizes import format_size, parse_size
from ...errors import BudgetError, ConfigError
from ..options.checks import check_model, settings_of_flags
from ..options.ending import EXIT_CODES
from ..options.flags import ConfigFile, Context, Dtype, Json, ProfileIn, TrustRemoteCode
from ..options.lists import split_list

LADDER = (4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)  # GB that machines have
COLUMNS = ("budget", "fits", "slots a layer", "resident", "hit rate", "largest context")


def estimate(
    models: Annotated[list[str], typer.Argument(help="Checkpoint folders or Hub repositories.", show_default=False)],
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="All the model may hold; several by commas: 4GB,8GB,16GB. Without it, from the smallest to all "
            "resident.",
        ),
    ] = None,
    profile: ProfileIn = None,
    context: Context = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """A table like accelerate estimate-memory: what each budget gives. Reads headers only; exit code 3 if none fits."""
    wanted = settings_of_flags(config_file, profile=profile, kv_tokens=context)
    sizes = [] if budget is None else [_budget(text) for text in split_list("--budget", budget, "4GB,8GB")]
    for name in models:
        check_model(name, weights=False)
    found = [_estimate(name, sizes, wanted, dtype, trust_remote_code) for name in models]
    if as_json:
        typer.echo(json.dumps(found))
    else:
        for one in found:
            _print(one)
        if len(found) > 1:
            _print_largest(found)
    if not any(row["fits"] for one in found for row in one["rows"]):
        raise typer.Exit(EXIT_CODES[BudgetError])


def _budget(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"--budget: {error}") from None


def _estimate(name: str, sizes: list[int], wanted: OffloadConfig, dtype: str, trusted: bool) -> dict[str, Any]:
    from ...plan.forecast import of_outline, read_outline

    found = read_outline(name, dtype, trusted)
    # One device, whatever the file says of several: each row is about one budget on it.
    wanted = dataclasses.replace(wanted, device_map="disk", max_memory=None)
    most = of_outline(found, dataclasses.replace(wanted, budget=2**60))
    rows: list[dict[str, Any]] = []
    for size in sizes or choose_budgets(most.floor_bytes, most.resident_bytes):
        try:
            one = of_outline(found, dataclasses.replace(wanted, budget=size))
        except BudgetError:
            rows.append({"budget": size, "fits": False})
        else:
            rows.append(
                {
                    "budget": size,
                    "fits": True,
                    "slots": [min(one.arrangement.slots), max(one.arrangement.slots)],
                    "residency": next(iter(one.plans.values())).residency,
                    "hit_rate": dataclasses.asdict(one.hit_rate),
                    "largest_context": one.largest_context,
                }
            )
    plan = next(iter(most.plans.values()))
    return {
        "model": name,
        "source": most.source,
        "layers": len(most.moe_layers),
        "experts": max(moe.num_experts for moe in most.moe_layers),
        "top_k": max(moe.top_k for moe in most.moe_layers),
        "dense_bytes": plan.costs.dense_bytes,
        "expert_bytes": plan.expert_bytes,
        "row_bytes": max(layer.row_bytes for layer in plan.layers),
        "floor_bytes": most.floor_bytes,
        "resident_bytes": most.resident_bytes,
        "context": {"tokens": most.context, "kv_bytes": most.kv_bytes},
        "rows": rows,
    }


def choose_budgets(floor_bytes: int, resident_bytes: int) -> list[int]:
    """Budgets worth a row: the floor, usual memory sizes between it and where every expert is resident, and that."""
    usual = [n * 10**9 for n in LADDER if floor_bytes < n * 10**9 < resident_bytes]
    if not usual:  # a model too small for usual sizes
        usual = [floor_bytes + (resident_bytes - floor_bytes) * part // 4 for part in (1, 2, 3)]
    return [floor_bytes, *usual, resident_bytes]


def _print(one: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    typer.echo(f"{one['model']}: sizes from {one['source']}")
    typer.echo(
        f"  dense weights {format_size(one['dense_bytes'])}, experts {format_size(one['expert_bytes'])} in "
        f"{one['layers']} layers of {one['experts']} (top-{one['top_k']}), row {format_size(one['row_bytes'])}"
    )
    typer.echo(
        f"  floor {format_size(one['floor_bytes'])}, all resident {format_size(one['resident_bytes'])}, KV cache at "
        f"{one['context']['tokens']} tokens {format_size(one['context']['kv_bytes'])}"
    )
    table = Table(*COLUMNS, box=SIMPLE_HEAD)
    for row in one["rows"]:
        table.add_row(*_cells(row))
    Console(width=100, highlight=False).print(table, end="")
    source = next((row["hit_rate"]["source"] for row in one["rows"] if row["fits"]), None)
    if source is not None:
        typer.echo(f"  hit rate: {source}")


def _cells(row: dict[str, Any]) -> list[str]:
    size = format_size(row["budget"])
    if not row["fits"]:
        return [size, "no", "", "", "", ""]
    (few, many), rate = row["slots"], row["hit_rate"]
    slots = f"{few}" if few == many else f"{few} to {many}"
    spread = f" ({rate['low']:.0%} to {rate['high']:.0%})" if rate["low"] != rate["high"] else ""
    return [
        size,
        "yes",
        slots,
        f"{row['residency']:.0%}",
        f"{rate['expected']:.0%}{spread}",
        f"{row['largest_context']}",
    ]


def _print_largest(found: list[dict[str, Any]]) -> None:
    """Of several models, the one with the most experts that fits each budget."""
    typer.echo("the largest that fits:")
    for size in sorted({row["budget"] for one in found for row in one["rows"]}):
        fitting = [one for one in found if one["floor_bytes"] <= size]
        largest = max(fitting, key=lambda one: one["expert_bytes"] + one["dense_bytes"], default=None)
        typer.echo(f"  {format_size(size):>12}  {largest['model'] if largest else 'none of them'}")
