"""The charts of a report, each drawn once, with matplotlib: as SVG for the page, as PNG for a README.

In the SVG colours are variables of the page's style sheet, so that dark pages have theirs, and text is text. A chart is
as wide as a phone: its labels are never drawn smaller than they are here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ...errors import ReportError
from ...files.whole_file import save_whole
from .advice import find_decoding, hit_rate_of, sum_up_run
from .run_record import RunForward, RunRecord

POINTS = 80  # of a line: enough to see where it goes, few enough to smooth what jumps from token to token
INCHES = (3.9, 2.3)  # 281 points wide: on 350 pixels of a phone, 8.5 points are 10.6 pixels
FONT_POINTS = 8.5
#: Each colour as it is in a PNG, and the variable of the page that stands in for it.
OURS, BEST, WARM, QUIET, RULE = "#0b6e99", "#8a8f94", "#c2571a", "#65707a", "#e2dfd7"
VARIABLES = {OURS: "--ours", BEST: "--best", WARM: "--warm", QUIET: "--quiet", RULE: "--rule"}
HEAT_RGB = (0.18, 0.56, 0.74)  # of an image, which has no variables: seen on light and on dark
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": FONT_POINTS, "axes.labelsize": FONT_POINTS, "axes.titlesize": FONT_POINTS,
    "xtick.labelsize": FONT_POINTS, "ytick.labelsize": FONT_POINTS, "legend.fontsize": FONT_POINTS,
    "text.color": QUIET, "axes.labelcolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET, "axes.edgecolor": RULE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "axes.titlelocation": "left", "lines.linewidth": 1.6, "legend.frameon": False,
    "svg.fonttype": "none", "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """`draw` fills the axes, and returns whether there was anything to draw; `label` is the text for screen readers."""

    label: str
    draw: Callable[[RunRecord, Any], bool]


def svg_of(name: str, run: RunRecord) -> str:
    """The chart `name` as an SVG element; "" where there is nothing to draw. Raises ReportError without matplotlib."""
    svg = _drawn(name, run, "svg").decode()
    if not svg:
        return ""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)  # as wide as the page has room
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{CHARTS[name].label}" ', 1)
    for mark in ('id="', 'href="#', "url(#"):  # several charts are on one page
        svg = svg.replace(mark, f"{mark}{name}-")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def write_png(run: RunRecord, folder: Path) -> list[Path]:
    """`<chart>.png` of each chart that has anything in it, in `folder`, which must exist. Raises ReportError."""
    written = []
    for name in CHARTS:
        path, data = folder / f"{name}.png", _drawn(name, run, "png")
        if not data:
            continue
        written.append(save_whole(path, data, "chart", ReportError))
    return written


def group_forwards(forwards: Sequence[RunForward]) -> list[tuple[int, list[RunForward]]]:
    """At most POINTS groups of neighbours, each with the number of tokens up to its end."""
    size = max(1, -(-len(forwards) // POINTS))
    found, tokens = [], 0
    for i in range(0, len(forwards), size):
        group = list(forwards[i : i + size])
        tokens += sum(forward.tokens for forward in group)
        found.append((tokens, group))
    return found


def _drawn(name: str, run: RunRecord, kind: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError('a report needs matplotlib: in the clone, pip install -e ".[report]"') from error
    data = BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=INCHES, layout="constrained")
        if not CHARTS[name].draw(run, figure.subplots()):
            return b""
        nobody = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else {"Software": None}
        figure.savefig(data, format=kind, dpi=200, transparent=kind == "svg", metadata=nobody)
    return data.getvalue()


def _draw_hits(run: RunRecord, ax: Any) -> bool:
    groups = [(at, group) for at, group in group_forwards(run.forwards) if hit_rate_of(group) is not None]
    at = [tokens for tokens, _ in groups]
    if sum_up_run(run).best_rate is not None:
        best = [100 * (hit_rate_of(group, best=True) or 0) for _, group in groups]
        ax.plot(at, best, color=BEST, linestyle="--", label="Belady's best", marker=_marker(at))
    ax.plot(
        at, [100 * (hit_rate_of(group) or 0) for _, group in groups], color=OURS, label="this run", marker=_marker(at)
    )
    ax.set(xlabel="tokens", title="hit rate, %", ylim=(0, 103), xlim=(0, None))
    ax.legend(loc="lower right")
    return bool(groups)


def _draw_read(run: RunRecord, ax: Any) -> bool:
    return _draw_per_token(run, ax, "bytes_read", 1e-6, "MB read per token", OURS)


def _draw_waited(run: RunRecord, ax: Any) -> bool:
    return _draw_per_token(run, ax, "stall_s", 1e3, "ms waited per token", WARM)


def _draw_per_token(run: RunRecord, ax: Any, counter: str, scale: float, title: str, colour: str) -> bool:
    groups = group_forwards(find_decoding(run))
    at = [tokens for tokens, _ in groups]
    sums = [scale * sum(getattr(forward, counter) for forward in group) for _, group in groups]
    tokens = [sum(forward.tokens for forward in group) for _, group in groups]
    ax.plot(at, [s / max(n, 1) for s, n in zip(sums, tokens, strict=True)], color=colour, marker=_marker(at))
    ax.set(xlabel="tokens decoded", title=title, xlim=(0, None), ylim=(0, None if any(sums) else 1))
    return bool(groups)


def _draw_experts(run: RunRecord, ax: Any) -> bool:
    """Draw the share of each expert, layer by layer; the darkest colour is four times an even share, or more."""
    import numpy as np

    widest = max(len(layer.counts) for layer in run.layers)
    heat = np.zeros((len(run.layers), widest, 4))
    heat[..., :3] = HEAT_RGB
    for i, layer in enumerate(run.layers):
        ranked = np.sort(np.array(layer.counts, dtype=float))[::-1]
        share = ranked / max(ranked.sum(), 1)
        heat[i, : len(ranked), 3] = np.minimum(share * len(ranked) / 4, 1.0)
    ax.imshow(heat, aspect="auto", interpolation="none", extent=(0, widest, len(run.layers) - 0.5, -0.5))
    ax.grid(False)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="experts, the most used first", title="layer")
    return bool(heat[..., 3].any())


def _draw_budgets(run: RunRecord, ax: Any) -> bool:
    unit, scale = ("GB", 1e9) if run.budget_bytes >= 10**9 else ("MB", 1e6)
    budgets = [point.budget_bytes / scale for point in run.curve]
    ax.plot(budgets, [100 * point.hit_rate for point in run.curve], color=OURS, marker=".")
    ax.axvline(min(run.budget_bytes / scale, max(budgets, default=0)), color=QUIET, linestyle=":")
    ax.set(xlabel=f"budget, {unit} (the line: this run's)", title="hit rate of this run, %", ylim=(0, 103))
    ax.set_xlim(0, None)
    return bool(run.curve)


def _marker(points: Sequence[object]) -> str:
    """The marker of a line: a dot for a single point, which would not be seen as a line."""
    return "." if len(points) == 1 else ""


CHARTS = {
    "hits": Chart("hit rate over tokens", _draw_hits),
    "read": Chart("megabytes read per token", _draw_read),
    "waited": Chart("milliseconds waited per token", _draw_waited),
    "experts": Chart("uses per layer and expert", _draw_experts),
    "budgets": Chart("hit rate over budgets", _draw_budgets),
}
