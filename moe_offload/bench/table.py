"""The result of a bench as a person reads it."""

from __future__ import annotations

from typing import Any

from ..sizes import format_size
from .result import RATIOS

COLUMNS = (
    "", "tokens/s", "ms/token", "TTFT s", "hits", "Belady", "read/token", "stall ms", "peak memory", "load s", "limit",
)  # fmt: skip


def table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    head = [
        f"{result['model']}, {result['date']}",
        f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['memory_bytes'])}, "
        f"{gpu}torch {machine['torch']}, transformers {machine['transformers']}",
        f"budget {format_size(result['budget_bytes'])}: {result['residency']:.0%} of the experts resident, row "
        f"{format_size(result['row_bytes'])}",
        f"{result['requests']} requests of {result['prompt_tokens']} + {result['new_tokens']} tokens "
        f"({result['prompt']}), medians; ours reads {'a packed copy' if result['packed'] else 'the checkpoint itself'}",
        f"routing: {result['routing']}",
        f"{_roofs(result['roofs'])}; {_agreement(result)}",
        "",
    ]
    grid = [COLUMNS, *(_cells(row) for row in result["rows"])]
    widths = [max(len(line[i]) for line in grid) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in grid
    ]
    ratios = [
        f"{name:<55}{'not measured' if (r := result['ratios'][key]) is None else f'{r:.2f}':>13}"
        for key, name in RATIOS[result["device"]].items()
    ]
    failed = [f"{row['side']} failed: {row['failed']}" for row in result["rows"] if row["failed"]]
    return "\n".join([*head, *lines, "", *ratios, *failed])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def show(key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if key in row else ""

    tokens_per_s = row.get("tokens_per_s")
    return (
        row["side"],
        show("tokens_per_s", ".2f"),
        f"{1e3 / tokens_per_s:.0f}" if tokens_per_s else "",
        show("ttft_s", ".2f"),
        show("hit_rate", ".1%"),
        show("belady_hit_rate", ".1%"),
        format_size(int(row["bytes_per_token"])) if "bytes_per_token" in row else "",
        show("stall_s_per_token", ".1f", 1e3),
        format_size(row["peak_bytes"]) if "peak_bytes" in row else "",
        show("load_s", ".1f"),
        row["limited"],
    )


def _roofs(roofs: dict[str, Any]) -> str:
    names = {"disk": "disk roof", "copy_engine": "link by copy engine", "kernel": "by the gather kernel"}
    found = [(name, roofs.get(f"{key}_bytes_per_s")) for key, name in names.items()]
    return ", ".join(f"{name} {format_size(int(rate))}/s" for name, rate in found if rate is not None)


def _agreement(result: dict[str, Any]) -> str:
    if len(result["rows"]) == 1:
        return "one side only, whose tokens nothing is compared with"
    if result["tokens_differ"]:
        return f"OTHER TOKENS than {result['tokens_of']}: {', '.join(result['tokens_differ'])}"
    return f"all sides gave the tokens of {result['tokens_of']}"
