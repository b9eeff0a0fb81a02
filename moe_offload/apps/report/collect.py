"""From a running model to the record of its run. The trace is replayed here, so that a report needs no model.

Shapes: V events of one layer.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np
import psutil

from ...handle import Handle
from ...observe.profile import CREATED
from ...observe.trace import Trace
from ...observe.trace_recorder import ForwardRecord
from ...plan.budget import Plan, budget_for
from ..simulate.run import FIRST_TOKENS, replayed, slots_of
from ..simulate.stream import per_layer
from .run_record import MAX_STEPS, CurvePart, LayerPart, RunRecord, StepPart

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def record_of(handle: Handle, *, model: str, profile: str | None = None, ended_s: float | None = None) -> RunRecord:
    """The record of what ran since `handle.start_trace()`, called before the first token. Raises TraceError when
    nothing did. `ended_s`: when the run ended, by `handle.recorded_s()`; else it ends now.
    """
    ended_s = handle.recorded_s() if ended_s is None else ended_s
    trace, steps, stats = handle.trace(), handle.steps(), handle.stats()
    counts = handle.profile().counts
    return RunRecord(
        created=datetime.now(timezone.utc).strftime(CREATED),
        model=model[:512],
        machine=_machine(),
        budget_bytes=handle.plan.budget_bytes,
        plan=dict(handle.plan.rows()),
        profile=None if profile is None else profile[:512],
        prewarm_bytes=stats.prewarm_bytes,
        cold_first_hits=None if profile is None else _first_hits(trace, handle.plan),
        ended_s=ended_s,
        layers=[
            LayerPart(
                name=row["name"],
                top_k=layer.top_k,
                slots=row["slots"],
                row_bytes=layer.row_bytes,
                hits=row["hits"],
                misses=row["misses"],
                stall_s=row["stall_s"],
                counts=uses,
            )
            for row, layer, uses in zip(stats.layers, handle.plan.layers, counts, strict=True)
        ],
        steps=_steps(trace, steps, handle.plan),
        curve=_curve(trace, handle.plan),
    )


def _steps(trace: Trace, steps: Sequence[ForwardRecord], plan: Plan) -> list[StepPart]:
    best_V = np.zeros(len(trace.event_start), dtype=np.int64)
    for stream, slots in zip(per_layer(trace), plan.slots, strict=True):
        _, hits_V = replayed(stream, slots, "belady_bypass")  # a prompt passes the slots, too
        np.add.at(best_V, np.searchsorted(trace.event_start, stream.first_V), hits_V)
    asked = [step for step in steps if step.tokens]
    parts = [
        StepPart(
            began_s=step.began_s,
            tokens=step.tokens,
            hits=step.hits,
            misses=step.misses,
            best=min(best, step.hits + step.misses),
            bytes_read=step.bytes_read,
            stall_s=max(step.stall_s, 0.0),
        )
        for step, best in zip(asked, best_V.tolist(), strict=True)
    ]
    together = -(-len(parts) // MAX_STEPS)
    return parts if together <= 1 else [_sum(parts[i : i + together]) for i in range(0, len(parts), together)]


def _sum(parts: Sequence[StepPart]) -> StepPart:
    names = ("tokens", "hits", "misses", "best", "bytes_read", "stall_s")
    return StepPart(began_s=parts[0].began_s, **{n: sum(getattr(part, n) for part in parts) for n in names})


def _curve(trace: Trace, plan: Plan) -> list[CurvePart]:
    """Hit rates of the default policy from an empty cache, over budgets; those that the plan's other parts allow."""
    points = []
    for share in sorted({*SHARES, round(plan.residency, 4)}):
        asked = hits = missed_bytes = 0
        for stream, layer, slots in zip(per_layer(trace), plan.layers, slots_of(trace, share), strict=True):
            asked_V, hits_V = replayed(stream, slots, "default")
            asked, hits = asked + int(asked_V.sum()), hits + int(hits_V.sum())
            missed_bytes += int((asked_V - hits_V).sum()) * layer.row_bytes
        points.append(
            CurvePart(
                residency=share,
                budget_bytes=budget_for(share, plan.layers, plan.costs),
                hit_rate=hits / asked,
                bytes_per_token=missed_bytes / trace.tokens,
            )
        )
    return points


def _first_hits(trace: Trace, plan: Plan) -> int:
    """Hits of the first forwards, up to 32 tokens after the prompt, from an empty cache."""
    events = trace.event_start
    end = events[FIRST_TOKENS + 1] if len(events) > FIRST_TOKENS + 1 else trace.tokens
    hits = 0
    for stream, slots in zip(per_layer(trace), plan.slots, strict=True):
        _, hits_V = replayed(stream, slots, "default")
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
