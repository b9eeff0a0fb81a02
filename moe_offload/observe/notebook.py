"""What a notebook shows of an offloaded model: one block of HTML, no script, readable on light and dark pages.

Everything that comes from the model or its checkpoint is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ..cache.counters import LayerStats
from ..config.sizes import format_size
from .watched import Watched

#: Colours of the parts of a budget, in the order of `Plan.rows()`; the last, unused, is left empty.
COLOURS = ("#4c78a8", "#9ecae9", "#f58518", "#54a24b", "transparent")
FRAME = "border:1px solid rgba(128,128,128,.5);border-radius:3px"
CELL = "padding:1px 10px 1px 0;text-align:right;border:none"


def to_html(handle: Watched) -> str:
    """The budget by parts, what has happened so far, and the layers, folded away."""
    stats, plan = handle.stats(), handle.plan
    state = "closed" if handle.closed else f"{handle.implementation}, {handle.compile}, {stats.graphs} graphs compiled"
    if stats.requests:
        happened = (
            f"{stats.tokens} tokens: <b>{stats.hit_rate:.1%}</b> of {stats.requests} requests hit, "
            f"{format_size(stats.bytes_read)} read, {stats.stall_s:.2f} s waited"
        )
    else:
        happened = "nothing has run yet"
    return (
        '<div style="font-family:sans-serif;font-size:13px;line-height:1.5;max-width:720px">'
        f"<div><b>{escape(handle.name)}</b> offloaded &middot; budget {format_size(plan.budget_bytes)} &middot; "
        f"{len(plan.layers)} MoE layers, {plan.residency:.0%} of {format_size(plan.expert_bytes)} of experts in slots, "
        f"the rest on {escape(', '.join(sorted(set(handle.tiers))))} &middot; {escape(state)}</div>"
        f"{_budget(plan.rows(), plan.budget_bytes)}<div>{happened}</div>{_layers(stats.layers)}</div>"
    )


def _budget(rows: Iterable[tuple[str, int]], budget_bytes: int) -> str:
    parts, keys = [], []
    for (name, size), colour in zip(rows, COLOURS, strict=True):
        text = f"{escape(name)} {format_size(size)}"
        width = 100 * max(size, 0) / budget_bytes
        parts.append(f'<div title="{text}" style="width:{width:.2f}%;background:{colour}"></div>')
        swatch = f"display:inline-block;width:.8em;height:.8em;background:{colour};{FRAME}"
        keys.append(f'<span style="margin-right:12px;white-space:nowrap"><span style="{swatch}"></span> {text}</span>')
    bar = f"display:flex;height:14px;overflow:hidden;margin:4px 0;{FRAME}"
    return f'<div style="{bar}">{"".join(parts)}</div><div style="font-size:12px">{"".join(keys)}</div>'


def _layers(layers: list[LayerStats]) -> str:
    titles = "".join(
        f'<th style="{CELL}">{title}</th>' for title in ("layer", "resident", "hit rate", "", "read", "waited")
    )
    return (
        f'<details><summary style="cursor:pointer">{len(layers)} layers</summary>'
        f'<table style="border-collapse:collapse;font-size:12px"><tr>{titles}</tr>'
        f"{''.join(_layer(i, layer) for i, layer in enumerate(layers))}</table></details>"
    )


def _layer(index: int, layer: LayerStats) -> str:
    bar = (
        f'<div style="width:120px;height:9px;{FRAME}">'
        f'<div style="width:{100 * layer.hit_rate:.1f}%;height:100%;background:{COLOURS[3]}"></div></div>'
    )
    cells = [
        f"{index}",
        f"{layer.resident}/{layer.slots} of {layer.experts}",
        bar,
        f"{layer.hit_rate:.1%}" if layer.requests else "-",
        format_size(layer.bytes_read),
        f"{layer.stall_s:.2f} s",
    ]
    row = "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells)
    return f'<tr title="{escape(layer.name)}" style="background:none">{row}</tr>'
