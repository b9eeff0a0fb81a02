"""From a running model to the record of its run. The trace is replayed here, so that a report needs no model.

Shapes: V events of one layer.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import psutil

from ...cache.counters import Counters
from ...handle import Handle
from ...observe.profile import CREATED
from ...observe.progress import DELAY_S, show_bar
from ...observe.trace import Trace
from ...observe.trace.recorder import ForwardRecord
from ...plan.budget import Plan, budget_for
from ..simulate.run import replay_stream, slots_of
from ..simulate.stream import per_layer
from .advice import first_forwards
from .run_record import MAX_FORWARDS, RunBudget, RunForward, RunLayer, RunRecord

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

Replay = Callable[..., tuple[Any, Any]]  # as `replay_stream`: stream, slots, policy -> asked_V, hits_V


def collect_run(handle: Handle, *, model: str, profile: str | None = None, ended_s: float | None = None) -> RunRecord:
    """The record of what ran since `handle.start_trace()`, called before the first token. It replays the trace, and
    shows a bar where that takes long.

    Args:
        handle: Of the model that ran.
        model: What it is to be called.
        profile: The name of the profile that it was pre-warmed with.
        ended_s: When the run ended, by `handle.recorded_s()`; None: now.

    Raises:
        TraceError: Nothing ran, or no trace was recorded.
    """
    ended_s = handle.recorded_s() if ended_s is None else ended_s
    trace, stats, plan = handle.trace(), handle.stats(), handle.plan
    forwards = [forward for forward in handle.forwards() if forward.tokens]
    replays = len(plan.layers) * (1 + len(_shares(plan)) + (profile is not None))
    with show_bar("Replaying", replays, unit="layer", what="the run", delay_s=DELAY_S) as shown:

        def replay(*asked: Any) -> tuple[Any, Any]:
            found = replay_stream(*asked)
            shown.update(1)
            return found

        return RunRecord(
            created=datetime.now(timezone.utc).strftime(CREATED),
            model=model[:512],
            machine=_machine(),
            budget_bytes=plan.budget_bytes,
            plan=dict(plan.rows()),
            profile=None if profile is None else profile[:512],
            prewarm_bytes=stats.prewarm_bytes,
            cold_first_hits=None if profile is None else _first_hits(trace, forwards, plan, replay),
            ended_s=ended_s,
            layers=[
                RunLayer(**dataclasses.asdict(layer), counts=counts)
                for layer, counts in zip(stats.layers, handle.profile().counts, strict=True)
            ],
            forwards=_forwards(trace, forwards, plan, replay),
            curve=_curve(trace, plan, replay),
        )


def _forwards(trace: Trace, forwards: Sequence[ForwardRecord], plan: Plan, replay: Replay) -> list[RunForward]:
    best_V = np.zeros(len(trace.event_start), dtype=np.int64)
    for stream, slots in zip(per_layer(trace), plan.slots, strict=True):
        _, hits_V = replay(stream, slots, "belady_bypass")  # a prompt passes the slots, too
        np.add.at(best_V, np.searchsorted(trace.event_start, stream.first_V), hits_V)
    return put_together(
        [
            RunForward(**dataclasses.asdict(forward), best=min(best, forward.requests))
            for forward, best in zip(forwards, best_V.tolist(), strict=True)
        ]
    )


def put_together(parts: Sequence[RunForward]) -> list[RunForward]:
    """At most MAX_FORWARDS forwards: of a longer run neighbours are put together, but for the first ones."""
    if len(parts) <= MAX_FORWARDS:
        return list(parts)
    first = len(first_forwards(parts))
    together = -(-(len(parts) - first) // (MAX_FORWARDS - first))
    return [*parts[:first], *(_sum(parts[i : i + together]) for i in range(first, len(parts), together))]


def _sum(parts: Sequence[RunForward]) -> RunForward:
    """Neighbours as one; it decodes if each of them does."""
    return RunForward(
        **reduce(add, parts, Counters()).values(),
        began_s=parts[0].began_s,
        ended_s=parts[-1].ended_s,
        compile_s=sum(part.compile_s for part in parts),
        decode=all(part.decode for part in parts),
        best=sum(part.best for part in parts),
    )


def _shares(plan: Plan) -> list[float]:
    return sorted({*SHARES, round(plan.residency, 4)})


def _curve(trace: Trace, plan: Plan, replay: Replay) -> list[RunBudget]:
    """Hit rates of the default policy from an empty cache, over budgets; those that the plan's other parts allow."""
    points = []
    for share in _shares(plan):
        asked = hits = missed_bytes = 0
        for stream, layer, slots in zip(per_layer(trace), plan.layers, slots_of(trace, share), strict=True):
            asked_V, hits_V = replay(stream, slots, "default")
            asked, hits = asked + int(asked_V.sum()), hits + int(hits_V.sum())
            missed_bytes += int((asked_V - hits_V).sum()) * layer.row_bytes
        points.append(
            RunBudget(
                residency=share,
                budget_bytes=budget_for(share, plan.layers, plan.costs),
                hit_rate=hits / asked,
                bytes_per_token=missed_bytes / trace.tokens,
            )
        )
    return points


def _first_hits(trace: Trace, forwards: Sequence[ForwardRecord], plan: Plan, replay: Replay) -> int:
    """What the first forwards would have hit from an empty cache."""
    first = len(first_forwards(forwards))
    end = trace.event_start[first] if first < len(trace.event_start) else trace.tokens
    hits = 0
    for stream, slots in zip(per_layer(trace), plan.slots, strict=True):
        _, hits_V = replay(stream, slots, "default")
        hits += int(hits_V[stream.first_V < end].sum())
    return hits


def _machine() -> dict[str, str]:
    import torch
    import transformers

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": str(psutil.cpu_count(logical=False) or psutil.cpu_count() or 1),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
