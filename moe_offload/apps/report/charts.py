"""Charts as SVG, drawn with nothing: lines over an axis, a heat map. Colours are CSS variables of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 240, 52, 34, 12, 12


@dataclass(frozen=True)
class Line:
    """`points` are (x, y); `style` is a class of the page's style sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def lines(series: Sequence[Line], *, x: str, y: str, top: float | None = None, mark: float | None = None) -> Markup:
    """Lines over one axis each way, from 0; `mark` is a place on the x axis to point out."""
    given = [line for line in series if line.points]
    if not given:
        return Markup('<p class="empty">nothing was recorded</p>')
    x_top = max(px for line in given for px, _ in line.points) or 1.0
    y_top = top or nice(max(py for line in given for _, py in line.points) or 1.0)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(px: float, py: float) -> str:
        at_x = LEFT + (right - LEFT) * px / x_top
        return f"{at_x:.1f},{bottom - (bottom - TOP) * min(py / y_top, 1.0):.1f}"

    parts = []
    for i in range(5):
        at_y = bottom - (bottom - TOP) * i / 4
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at_y:.1f}" y2="{at_y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{at_y + 4:.1f}" text-anchor="end">{short(y_top * i / 4)}</text>'
        )
        at_x = LEFT + (right - LEFT) * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        parts.append(
            f'<text class="tick" x="{at_x:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{short(x_top * i / 4)}</text>'
        )
    if mark is not None:
        at = place(mark, 0).partition(",")[0]
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
    for line in given:
        if len(line.points) == 1:
            cx, _, cy = place(*line.points[0]).partition(",")
            parts.append(f'<circle class="{line.style}" cx="{cx}" cy="{cy}" r="3"/>')
        parts.append(f'<polyline class="{line.style}" points="{" ".join(place(*point) for point in line.points)}"/>')
    legend = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in given)
    return Markup(
        f'<figure><figcaption><b>{escape(y)}</b> over {escape(x)} <span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)}">{"".join(parts)}</svg></figure>'
    )


def heat_map(rows: Sequence[tuple[str, Sequence[int]]]) -> Markup:
    """A row a layer, a column an expert, the most used first; colour is the share of the layer's uses."""
    if not any(any(counts) for _, counts in rows):
        return Markup('<p class="empty">no expert has been used</p>')
    columns = max(len(counts) for _, counts in rows)
    cell = (WIDTH - LEFT - RIGHT) / columns
    tall = max(4.0, min(16.0, 420 / len(rows)))
    every = math.ceil(len(rows) / 26)
    parts = []
    for i, (name, counts) in enumerate(rows):
        total, at = sum(counts) or 1, TOP + i * tall
        if i % every == 0:
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + tall / 2 + 4:.1f}" text-anchor="end">{i}</text>')
        ranked = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
        for j, e in enumerate(ranked):
            if not counts[e]:
                break
            share = counts[e] / total
            strength = min(1.0, share * len(counts) / 4)  # four times an even share is as dark as it gets
            parts.append(
                f'<rect class="heat" x="{LEFT + j * cell:.2f}" y="{at:.2f}" width="{max(cell - 0.4, 0.4):.2f}" '
                f'height="{tall - 0.6:.2f}" fill-opacity="{0.06 + 0.94 * strength:.3f}">'
                f"<title>{escape(name)}, expert {e}: {share:.1%} of its uses</title></rect>"
            )
    height = TOP + len(rows) * tall + 6
    return Markup(
        f'<figure><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="uses per layer and expert">'
        f"{''.join(parts)}</svg></figure>"
    )


def nice(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten: quarters of it are short numbers."""
    scale = 10.0 ** math.floor(math.log10(max(value, 1e-12)))
    return next(step * scale for step in (1.0, 2.0, 4.0, 6.0, 8.0, 10.0) if step * scale >= value * 0.999)


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
