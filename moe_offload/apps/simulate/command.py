"""What `moe-offload simulate` does, apart from the shell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import TraceError
from ...observe.trace import Trace
from ..options.checks import check_output
from ..options.lists import split_list
from .run import ALL, SimulationResult, simulate
from .show import check_plot, write_json, write_plot


def run_simulation(
    paths: Sequence[Path],
    *,
    policies: str,
    capacities: str,
    starts: str,
    pooled: bool,
    json_file: Path | None,
    plot: Path | None,
    note: Callable[[str], object],
) -> list[SimulationResult]:
    """The rows; the JSON and the plot are written. What is no trace among several files is noted and skipped.

    Raises TraceError when nothing is left, ConfigError for what cannot be asked for.
    """
    check_output("--out", json_file)
    check_output("--save-plot", plot)
    if plot is not None:
        check_plot()
    given = split_list("--policies", policies, "lru,belady")
    names = [name for one in given for name in (ALL if one == "all" else [one])]
    rows = simulate(
        _load(paths, note),
        list(dict.fromkeys(names)),
        split_list("--residency", capacities, "25%,50%"),
        starts=split_list("--start", starts, "warm,cold"),
        pool=pooled,
    )
    if json_file is not None:
        write_json(rows, json_file)
    if plot is not None:
        write_plot(rows, plot)
    return rows


def _load(paths: Sequence[Path], note: Callable[[str], object]) -> dict[str, Trace]:
    traces: dict[str, Trace] = {}
    errors: list[TraceError] = []
    for path in paths:
        try:
            traces[path.stem if path.stem not in traces else str(path)] = Trace.load(path)
        except TraceError as error:
            errors.append(error)
    if not traces:
        raise errors[0]
    for skipped in errors:
        note(f"skipped: {skipped}")
    return traces
