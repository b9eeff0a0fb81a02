"""Fill the slots before anything has asked: what is missed most first, across all layers.

A profile that was asked for is waited for. Remembered usage is nobody's wish: its rows are read while no forward runs,
so that the first token never comes later for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from ..config.sizes import format_size
from ..errors import OffloadError
from ..observe.profile import Profile
from ..observe.profile_stats import most_wanted
from ..observe.progress import show_bar
from .in_flight import Arrivals
from .model import Runtime

logger = logging.getLogger("moe_offload")

DEPTH = 4  # rows on their way at once
PAUSE_S = 0.001  # between some rows and the next: whoever waits for the lock gets it then
BUSY_S = 0.1  # after a forward: another one probably follows it


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
    with runtime.lock, runtime.busy():
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


def prewarm_when_idle(runtime: Runtime, profile: Profile) -> threading.Thread:
    """As `prewarm_from`, by a thread that is returned, while no forward runs; until there is no more room, or the model
    is closed."""
    wanted = deque(most_wanted(profile, [layer.cache.slots for layer in runtime.layers]))
    thread = threading.Thread(target=_prewarm_between, args=(runtime, wanted), name="moe_offload_prewarm", daemon=True)
    thread.start()
    return thread


def _prewarm_between(runtime: Runtime, wanted: deque[tuple[int, int]]) -> None:
    seen = _events(runtime)
    try:
        while wanted:
            with runtime.lock, runtime.current():
                if runtime.closed:
                    return
                now = _events(runtime)
                if now == seen:
                    prewarm_slots(runtime, [wanted.popleft() for _ in range(min(DEPTH, len(wanted)))])
            time.sleep(PAUSE_S if now == seen else BUSY_S)
            seen = now
    except OffloadError as error:  # a row that cannot be read: whoever asks for it is told
        logger.info("pre-warming ended early: %s", error)


def _events(runtime: Runtime) -> int:
    return sum(layer.counters.events for layer in runtime.layers)
