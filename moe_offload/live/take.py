"""A look at a running model, from any thread: it reads counters and waits for no lock, so it never holds a token up.

The counters of a layer move while they are read. Each is right by itself; a hit more or less stands beside the token
that it belongs to.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import psutil

from .snapshot import LayerNow, Snapshot

if TYPE_CHECKING:
    from ..handle import Handle


def take(handle: Handle) -> Snapshot:
    """The state and the counters of `handle`'s model as of now."""
    stats, depth = handle.stats(), handle.depth()
    names = [name for name in Snapshot.model_fields if name in stats.__dataclass_fields__ and name != "layers"]
    return Snapshot(
        **{name: getattr(stats, name) for name in names},
        model=handle.name,
        pid=os.getpid(),
        uptime_s=time.monotonic() - handle.begun,
        budget_bytes=handle.plan.budget_bytes,
        plan=dict(handle.plan.rows()),
        rss_bytes=psutil.Process().memory_info().rss,
        queued=depth.urgent + depth.background,
        reading=depth.reading,
        layers=[
            LayerNow(**{**row, "name": row["name"][:256]}, row_bytes=layer.row_bytes)
            for row, layer in zip(stats.layers, handle.plan.layers, strict=True)
        ],
    )
