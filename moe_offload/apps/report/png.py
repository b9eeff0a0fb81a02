"""The charts of a report as PNG, for a README."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from ...errors import ReportError
from ...files.whole_file import save_whole
from .advice import rate, summary
from .page import grouped
from .run_record import RunRecord


def write_png(run: RunRecord, folder: Path) -> list[Path]:
    """hits.png, experts.png and budgets.png in `folder`, which must exist. Raises ReportError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError('--save-charts needs matplotlib: in the clone, pip install -e ".[report]"') from error
    written = []
    for name, draw in (("hits", _hits), ("experts", _experts), ("budgets", _budgets)):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        draw(run, figure.subplots())
        data = BytesIO()
        figure.savefig(data, format="png", dpi=150)
        written.append(save_whole(folder / f"{name}.png", data.getvalue(), "chart", ReportError))
    return written


def _hits(run: RunRecord, ax: Any) -> None:
    groups = grouped(run.steps)
    at = [tokens for tokens, _ in groups]
    if summary(run).best_rate is not None:
        best = [100 * (rate(g, best=True) or 0) for _, g in groups]
        ax.plot(at, best, color="0.5", linestyle="--", label="Belady's best")
    ax.plot(at, [100 * (rate(g) or 0) for _, g in groups], color="#0b6e99", label="this run")
    ax.set(xlabel="tokens", ylabel="hit rate, %", ylim=(0, 100))
    ax.legend(frameon=False, loc="lower right")
    ax.grid(alpha=0.2)


def _experts(run: RunRecord, ax: Any) -> None:
    widest = max(len(layer.counts) for layer in run.layers)
    shares = [
        [c / (sum(layer.counts) or 1) for c in sorted(layer.counts, reverse=True)]
        + [0.0] * (widest - len(layer.counts))
        for layer in run.layers
    ]
    image = ax.imshow(shares, aspect="auto", cmap="Blues", interpolation="nearest")
    ax.set(xlabel="experts, the most used first", ylabel="layer")
    ax.figure.colorbar(image, label="share of the layer's uses")


def _budgets(run: RunRecord, ax: Any) -> None:
    unit, scale = ("GB", 1e9) if run.budget_bytes >= 10**9 else ("MB", 1e6)
    budgets, hit_rates = [p.budget_bytes / scale for p in run.curve], [100 * p.hit_rate for p in run.curve]
    ax.plot(budgets, hit_rates, color="#0b6e99", marker=".")
    ax.axvline(run.budget_bytes / scale, color="0.3", linestyle=":")
    ax.set(xlabel=f"budget, {unit} (the line: this run's)", ylabel="hit rate of this run, %", ylim=(0, 100))
    ax.grid(alpha=0.2)
