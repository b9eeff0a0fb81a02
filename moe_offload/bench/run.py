"""The bench: sides that answer the same requests in turn, with the roofs measured beside them.

    roof    what a process that only reads gets from this disk, before and after each request of ours
    pairs   resident and ours stay alive together where both fit, and take turns request by request
    then    accelerate and mmap, each alone, under the memory limit that ours has

On a GPU the roof is what its link gives, measured once before all sides; no process is limited, memory is measured.

Every side answers the same prompts, over the same recorded routing, and must answer with the same tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ..checkpoint import shard_files
from ..errors import ConfigError
from ..pack import pack_checkpoint
from ..stores.reads import PART_BYTES
from ..transfer import THREADS
from .child import Child, SideFailed
from .contenders import PACKED, drop_cache, write_mapped
from .contenders_cuda import SIDES_ON
from .link import fastest
from .result import result_of, token_s
from .roofs import disk_roof
from .workload import Measured, Workload

SLACK_BYTES = 64 * 10**6  # what a process may hold beyond its budget, plus one row
ROOM_BYTES = 2 * 10**9  # that resident models leave for KV caches, workspace and everybody else
LEAST_LIMIT = 600 * 10**6  # libraries and tracing take some 150 MB however small the model


def bench(work: Workload, sides: Iterable[str], scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run `sides` over `work`; return the result as plain JSON values. `say` hears what happens, line by line."""
    wanted = list(sides)
    known = SIDES_ON[work.device]
    unknown = [side for side in wanted if side not in known]
    if unknown:
        raise ConfigError(f"--sides {unknown[0]}: on {work.device} there are {', '.join(known)}")
    size = sum(file.stat().st_size for file in shard_files(work.folder))
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="moe_offload-bench-", dir=scratch) as temporary:
        settings = {
            "folder": str(work.folder),
            "budget": work.plan.budget_bytes,
            "scratch": temporary,
            "routing": work.routing,
            "tokens": work.longest(),
            "device": work.device,
        }
        link = None if work.device == "cpu" else _link(work, settings, say)
        available = psutil.virtual_memory().available if link is None else int(link["free_bytes"])
        if work.packed and "ours" in wanted:
            say("ours: packing")
            pack_checkpoint(work.folder, Path(temporary) / PACKED, verify="none")
        room = available - ROOM_BYTES
        if "resident" in wanted and size > room:
            say("resident: the whole model does not fit in the memory that is free; left out")
            wanted.remove("resident")
        together = {"resident", "ours"} <= set(wanted) and size + work.plan.budget_bytes < room
        pairs = [["resident", "ours"]] if together else [[s] for s in ("resident", "ours") if s in wanted]
        for group in [*pairs, *([s] for s in known if s in wanted and s not in ("resident", "ours"))]:
            if group == ["mmap"]:
                say("mmap: writing the file to map")
                write_mapped(work.folder, Path(temporary))
            if link is None:
                drop_cache(work.folder, Path(temporary))
            for found in _measure(group, work, settings, link, say):
                measured[found.side] = found
    return result_of(work, measured, together, link)


def _link(work: Workload, settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, float]:
    """What the link gives a process that only copies, and how much of the device is free."""
    say("link: measuring")
    with Child("link", settings, None) as child:
        return child.do("link", row_bytes=max(layer.row_bytes for layer in work.plan.layers))


def _measure(
    group: Sequence[str],
    work: Workload,
    settings: dict[str, Any],
    link: dict[str, float] | None,
    say: Callable[[str], None],
) -> list[Measured]:
    """The sides of `group` alive together, taking turns. `link`: what was measured of it, where rows rest in RAM."""
    row_bytes = max(layer.row_bytes for layer in work.plan.layers)
    limit = max(work.plan.budget_bytes + SLACK_BYTES + row_bytes, LEAST_LIMIT)
    # The roof is that of the very files ours reads: what was written a moment ago may lie in a cache of the host.
    packed = sorted((Path(settings["scratch"]) / PACKED).glob("*.safetensors"))
    files = packed or shard_files(work.folder)
    disk = partial(disk_roof, files, min(row_bytes, PART_BYTES), THREADS)
    found = [Measured(side) for side in group]
    with ExitStack() as alive:
        children: dict[str, Child] = {}
        for one in found:
            say(f"{one.side}: loading")
            try:
                unlimited = one.side == "resident" or link is not None
                child = alive.enter_context(Child(one.side, settings, None if unlimited else limit))
                one.loaded, one.limited = child.do("load"), child.limited
                effort = work.effort(one.side)
                if effort.warm_up_tokens >= 0:
                    one.warm_up = child.do("ask", **work.request(0), new_tokens=effort.warm_up_tokens)
                children[one.side] = child
            except SideFailed as error:
                one.failed = str(error)
                say(str(error))
        for number in range(1, work.requests + 1):
            # Turns change: whoever is first in one request is last in the next.
            for one in found if number % 2 else reversed(found):
                effort = work.effort(one.side)
                if one.failed or number > effort.requests:
                    continue
                child = children[one.side]
                before = disk(seed=2 * number) if link is None else fastest(link)
                try:
                    if one.side == "ours" and link is None:
                        one.reads.append(child.do("read", seconds=1.5, seed=number)["bandwidth"])
                    one.answers.append(child.do("ask", **work.request(number), new_tokens=effort.new_tokens))
                except SideFailed as error:
                    one.failed = str(error)
                    say(str(error))
                    continue
                after = disk(seed=2 * number + 1) if link is None else fastest(link)
                one.roofs.append((before + after) / 2)
                answer = one.answers[-1]
                say(
                    f"{one.side}: request {number}: first token after {answer['ttft_s']:.2f} s, then "
                    f"{token_s(answer) * 1e3:.3g} ms a token"
                )
        for one in found:
            if one.side in children and not one.failed:
                child = children[one.side]
                one.peak_over_baseline = child.do("memory")["peak_bytes"] - child.baseline_bytes
    return found
