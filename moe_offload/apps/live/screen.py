"""The screen of `moe-offload top` about a running model. Without rates it shows totals only."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import zip_longest

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...cache.counters import Counters
from ...config.sizes import format_size
from ...observe.live.snapshot import Snapshot
from .rates import Rates

LINES = "▁▂▃▄▅▆▇█"
BAR = 12  # characters
HEAD = 9  # lines above the layers, and below


def draw_screen(now: Snapshot, rates: Rates | None, speeds: Sequence[float] = (), height: int = 1000) -> Group:
    """`speeds`: tokens/s of the looks so far, the last one last. `height`: lines there are; with more layers than that
    they stand side by side."""
    return Group(_title(now), _totals(now, rates, speeds), Text(), _layers(now, rates, height - HEAD))


def _title(now: Snapshot) -> Text:
    up = timedelta(seconds=int(now.uptime_s))
    return Text.assemble(
        (_clean(now.model), "bold"), f"   process {now.pid}, up {up}, {now.tokens} tokens, {now.graphs} graphs compiled"
    )


def _totals(now: Snapshot, rates: Rates | None, speeds: Sequence[float]) -> Table:
    table = Table.grid(padding=(0, 3))
    for _ in range(2):
        table.add_column(no_wrap=True, min_width=8)
    table.add_column()  # notes, which may take two lines rather than room from the figures
    if rates is not None:
        table.add_row("speed", f"{rates.tokens_per_s:.1f} tokens/s", sparkline(speeds))
    lately = "" if rates is None else f"{format_share(rates.hit_rate)} now, "
    table.add_row(
        "hit rate",
        f"{lately}{rate_of(now)} overall",
        f"{now.hits} of {now.requests} requests",
    )
    lately = "" if rates is None else f"{format_size(int(rates.bytes_per_s))}/s, "
    ahead = f"{now.ahead} rows read ahead, {now.late} of them late" if now.ahead else ""
    table.add_row("read", f"{lately}{format_size(now.moved_bytes)} in all", ahead)
    waited = f"{now.stall_s:.1f} s in all"
    lately = "" if rates is None else f"{format_share(rates.stall_share)} of the time, "
    table.add_row("waiting", f"{lately}{waited}", f"{now.queued} rows queued, {now.reading} reads under way")
    parts = ", ".join(
        f"{_clean(name).replace('_', ' ')} {format_size(size)}" for name, size in now.plan.items() if size
    )
    table.add_row("budget", format_size(now.budget_bytes), parts)
    table.add_row("memory", f"{format_size(now.rss_bytes)} in RAM", "the process, with Python and torch (some 400 MB)")
    return table


def _layers(now: Snapshot, rates: Rates | None, height: int) -> Table:
    """Layers fill one column after the other."""
    tall = max(4, min(len(now.layers), height))
    columns = [range(i, min(i + tall, len(now.layers))) for i in range(0, len(now.layers), tall)]
    table = Table.grid(padding=(0, 1))
    head = ["layer", "resident", "of", "hit rate", ""] + ([] if rates is None else ["now"])
    for _ in columns:
        for title in head:
            table.add_column(justify="left" if title == "hit rate" else "right", no_wrap=True)
        table.add_column(width=1)
    table.add_row(*[Text(title, "dim") for _ in columns for title in [*head, ""]])
    for row in zip_longest(*columns):
        cells: list[str | ProgressBar] = []
        for i in row:
            if i is None:
                continue
            layer = now.layers[i]
            cells += [f"{i}", f"{layer.resident}/{layer.slots}", f"{layer.experts}"]
            cells += [
                ProgressBar(total=1.0, completed=layer.hit_rate, width=BAR),
                rate_of(layer),
            ]
            cells += [] if rates is None else [format_share(rates.hit_rates[i])]
            cells.append("")
        table.add_row(*cells)
    return table


def sparkline(values: Sequence[float]) -> str:
    """One character a value, from nothing to the highest of them."""
    top = max(values, default=0.0)
    return "".join(LINES[int((len(LINES) - 1) * max(value, 0.0) / top)] for value in values) if top > 0 else ""


def format_share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def rate_of(counted: Counters) -> str:
    return format_share(counted.hit_rate if counted.requests else None)


def _clean(text: str) -> str:
    """Names come from checkpoints: nothing in them may steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
