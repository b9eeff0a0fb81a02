"""Fill the slots before the first token: the rows that a profile expects to be used most come first, of all layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from ..config.sizes import format_size
from ..observe.profile import Profile
from ..observe.profile_stats import most_wanted
from ..observe.progress import show_bar
from .in_flight import Arrivals
from .model import Runtime

DEPTH = 4  # rows on their way at once


def prewarm_from(runtime: Runtime, profile: Profile) -> None:
    """Fill the slots with what the profile expects, and show how far it is."""
    wanted = most_wanted(profile, [layer.cache.slots for layer in runtime.layers])
    size = sum(runtime.layers[layer].moe.layout.row_bytes for layer, _ in wanted)
    with show_bar("Pre-warming", len(wanted), unit="row", what=format_size(size)) as shown:
        prewarm_slots(runtime, wanted, shown.update)


def prewarm_slots(
    runtime: Runtime, wanted: Iterable[tuple[int, int]], progress: Callable[[int], object] = lambda n: None
) -> None:
    """Load `wanted`, (layer, expert) in the order in which they are missed most, into free slots.

    Stops cleanly at any exception (Ctrl-C): what has arrived by then stays. `progress(1)` is called after each row.
    """
    under_way: deque[Arrivals] = deque()
    with runtime.lock:
        for layer_runtime in runtime.layers:
            layer_runtime.arrivals.abort_interrupted()
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
