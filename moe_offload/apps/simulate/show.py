"""Rows as a table, as JSON, and as a plot: hit rate over capacity for each policy, Belady on top."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ...errors import TraceError
from ...files.whole_file import save_whole
from .run import SimulationResult

COLUMNS = ("policy", "hit rate", "first 32 tokens", "clean layer-steps", "misses/token", "MB/token", "gap closed")


def format_table(rows: Sequence[SimulationResult]) -> str:
    """One block per trace, start and capacity."""
    blocks = groupby(rows, key=lambda row: (row.trace, row.start, row.capacity))
    return "\n\n".join(_block(list(group)) for _, group in blocks)


def write_json(rows: Sequence[SimulationResult], path: Path) -> None:
    _write(path, rows_json(rows).encode() + b"\n")


def rows_json(rows: Sequence[SimulationResult]) -> str:
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1)


def write_plot(rows: Sequence[SimulationResult], path: Path) -> None:
    """A PNG, one panel per trace and start. Raises TraceError without matplotlib."""
    from io import BytesIO

    check_plot()
    from matplotlib.figure import Figure

    panels = {key: list(group) for key, group in groupby(rows, key=lambda row: (row.trace, row.start))}
    columns = min(2, len(panels))
    figure = Figure(figsize=(6.4 * columns, 4.2 * math.ceil(len(panels) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel()
    policies = list(dict.fromkeys(row.policy for row in rows))
    for ax, ((trace, start), found) in zip(axes, panels.items(), strict=False):
        for policy in policies:
            mine = sorted((row.capacity, row.hit_rate) for row in found if row.policy == policy)
            x, y = [100 * c for c, _ in mine], [100 * rate for _, rate in mine]
            ax.plot(x, y, label=policy, **_style(policy, policies))
        ax.set(title=f"{trace}, {start}", xlabel="experts resident, %", ylabel="hit rate, %")
        ax.grid(alpha=0.25)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    _write(path, png.getvalue())


def check_plot() -> None:
    """Raise TraceError unless a plot can be made: before minutes of simulation, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TraceError('--save-plot needs matplotlib: in the clone, pip install -e ".[report]"') from error


def _style(policy: str, policies: Sequence[str]) -> dict[str, object]:
    """The roof in black, the default bold, the others thin and each in a colour of its own."""
    if policy.startswith("belady"):
        return {"color": "black", "linestyle": "--" if "bypass" in policy else "-", "linewidth": 1.5, "marker": "."}
    if policy == "default":
        return {"color": "crimson", "linewidth": 2.5, "marker": "o", "zorder": 5}
    return {"color": f"C{policies.index(policy)}", "linewidth": 1, "marker": ".", "alpha": 0.8}


def _block(rows: Sequence[SimulationResult]) -> str:
    first = rows[0]
    where = "one cache, as many as" if first.pooled else "per layer:"
    lines = [list(COLUMNS), *map(_cells, rows)]
    filled = [any(column[1:]) for column in zip(*lines, strict=True)]
    lines = [[cell for cell, keep in zip(line, filled, strict=True) if keep] for line in lines]
    first_width, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head = f"{first.trace}, {first.start}, {first.capacity:.0%} of the experts ({where} {first.slots} slots)"
    body = ["  ".join(["", line[0].ljust(first_width), *map(str.rjust, line[1:], widths)]) for line in lines]
    return "\n".join([head, *body])


def _cells(row: SimulationResult) -> list[str]:
    return [
        row.policy,
        f"{row.hit_rate:.1%}",
        f"{row.first_tokens_hit_rate:.1%}",
        f"{row.clean_layer_steps:.1%}",
        f"{row.misses_per_token:.2f}",
        "" if row.bytes_per_token is None else f"{row.bytes_per_token / 1e6:.2f}",
        "" if row.gap_closed is None else f"{row.gap_closed:.1%}",
    ]


def _write(path: Path, data: bytes) -> None:
    save_whole(path, data, "result", TraceError)
