"""Fill the slots before anything has asked: what is missed most first, across all layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from .in_flight import Arrivals
from .model import Runtime

DEPTH = 4  # rows on their way at once


def prewarm_slots(
    runtime: Runtime, wanted: Iterable[tuple[int, int]], progress: Callable[[int], object] = lambda n: None
) -> None:
    """Load `wanted`, (layer, expert) in the order in which they are missed most, into free slots.

    Stops cleanly at any exception (Ctrl-C): what has arrived by then stays. `progress(1)` is called after each row.
    """
    under_way: deque[Arrivals] = deque()
    with runtime.lock:
        for layer_runtime in runtime.layers:
            if layer_runtime.arrivals.awaited:  # of an event that was interrupted before its wait
                layer_runtime.arrivals.abort()
        try:
            for layer, expert in wanted:
                arrivals = runtime.layers[layer].arrivals
                if arrivals.start_prewarm(expert):
                    under_way.append(arrivals)
                if len(under_way) >= DEPTH:
                    under_way.popleft().take(demanded=False)
                    progress(1)
            while under_way:
                under_way.popleft().take(demanded=False)
                progress(1)
        except BaseException:
            for layer_runtime in runtime.layers:
                layer_runtime.arrivals.abort()
            raise
