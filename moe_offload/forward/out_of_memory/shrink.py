"""Fewer slots in every layer of a model that is in use, because its device has run out of memory.

    decisions back to the host -> nothing under way -> all banks free -> new banks, connected

All old banks go before the first new one comes, and on a GPU their memory goes back to the driver in between: torch
would otherwise cut the new banks out of the old blocks, and what failed might not fit into any rest. (To empty torch's
cache and keep the slots is no use: its allocator has done that by itself before it gave up.) Every row is in a store
below, so what is in slots may be dropped. The policies go on with their scores, and what is used most comes back first.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from ...errors import OffloadError
from ...memory.devices import release_unused
from ...runtime.model import Runtime
from ..binding import connect_bank, disconnect_bank


def halve_spare_slots(slots: Sequence[int], floors: Sequence[int]) -> list[int]:
    """Half of what each layer has above its floor."""
    return [least + (have - least) // 2 for have, least in zip(slots, floors, strict=True)]


def shrink_banks(runtime: Runtime) -> int:
    """Give back half of the slots above the floor of each layer; returns the bytes: 0 where there are none.

    No graph that was compiled before may be run after. Whoever calls holds the lock, and has let go of those graphs and
    of what the forward that failed had computed. Raises what `Runtime.hand_back` does, and nothing is changed then;
    raises `OffloadError`, with the model closed, if the device has no memory even for less.
    """
    runtime.hand_back()
    before, floors = runtime.slots, [layer.moe.floor for layer in runtime.layers]
    after = halve_spare_slots(before, floors)
    if after == list(before):
        return 0
    device = str(runtime.layers[0].device)
    for slots in (after, floors):
        _let_go(runtime, device)
        try:
            for layer, count in zip(runtime.layers, slots, strict=True):
                layer.hold(count)
                connect_bank(layer)
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)
            continue
        runtime.leave_to_host()
        return sum(
            (had - layer.cache.slots) * layer.moe.layout.row_bytes
            for had, layer in zip(before, runtime.layers, strict=True)
        )
    _let_go(runtime, device)
    runtime.close()
    raise OffloadError(
        f"{device} has no memory left for the slots of one token's experts, which were given back a moment ago: "
        "something else has taken it. This model was closed; make room, and load it again"
    ) from failed


def _let_go(runtime: Runtime, device: str) -> None:
    runtime.layers[0].arrivals.scratch.drop()
    for layer in runtime.layers:
        disconnect_bank(layer)
        layer.empty()
    gc.collect()  # graphs that are gone hold their memory as long as they are part of a cycle
    release_unused(device)
