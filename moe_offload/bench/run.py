"""The bench: sides that answer the same requests in turn, with the roofs measured beside them.

    roof    what a process that only reads gets from this disk, before and after each request of ours
    pairs   resident and ours stay alive together where both fit, and take turns request by request
    then    accelerate and mmap, each alone, under the memory limit that ours has

Every side answers the same prompts, over the same recorded routing, and must answer with the same tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from ..checkpoint import shard_files
from ..errors import ConfigError
from ..pack import pack_checkpoint
from ..stores.reads import PART_BYTES
from ..transfer import THREADS
from .child import Child, SideFailed
from .contenders import PACKED, SIDES, drop_cache, write_mapped
from .result import result_of
from .roofs import disk_roof
from .workload import EFFORT, Measured, Workload

SLACK_BYTES = 64 * 10**6  # what a process may hold beyond its budget, plus one row
LEAST_LIMIT = 600 * 10**6  # libraries and tracing take some 150 MB however small the model


def bench(work: Workload, sides: Iterable[str], scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run `sides` over `work`; return the result as plain JSON values. `say` hears what happens, line by line."""
    wanted = list(sides)
    unknown = [side for side in wanted if side not in SIDES]
    if unknown:
        raise ConfigError(f"--sides {unknown[0]}: there are {', '.join(SIDES)}")
    size = sum(file.stat().st_size for file in shard_files(work.folder))
    available = psutil.virtual_memory().available
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="moe_offload-bench-", dir=scratch) as temporary:
        settings = {
            "folder": str(work.folder),
            "budget": work.plan.budget_bytes,
            "scratch": temporary,
            "routing": work.routing,
        }
        if work.packed and "ours" in wanted:
            say("ours: packing")
            pack_checkpoint(work.folder, Path(temporary) / PACKED, verify="none")
        room = available - 2 * 10**9
        if "resident" in wanted and size > room:
            say("resident: the whole model does not fit in the memory that is free; left out")
            wanted.remove("resident")
        together = {"resident", "ours"} <= set(wanted) and size + work.plan.budget_bytes < room
        pairs = [["resident", "ours"]] if together else [[s] for s in ("resident", "ours") if s in wanted]
        for group in [*pairs, *([s] for s in wanted if s in EFFORT)]:
            if group == ["mmap"]:
                say("mmap: writing the file to map")
                write_mapped(work.folder, Path(temporary))
            drop_cache(work.folder, Path(temporary))
            for found in _measure(group, work, settings, say):
                measured[found.side] = found
    return result_of(work, measured, together)


def _measure(
    group: Sequence[str], work: Workload, settings: dict[str, Any], say: Callable[[str], None]
) -> list[Measured]:
    """The sides of `group` alive together, taking turns."""
    row_bytes = max(layer.row_bytes for layer in work.plan.layers)
    limit = max(work.plan.budget_bytes + SLACK_BYTES + row_bytes, LEAST_LIMIT)
    # The roof is that of the very files ours reads: what was written a moment ago may lie in a cache of the host.
    packed = sorted((Path(settings["scratch"]) / PACKED).glob("*.safetensors"))
    files = packed or shard_files(work.folder)
    found = [Measured(side) for side in group]
    with ExitStack() as alive:
        children: dict[str, Child] = {}
        for one in found:
            say(f"{one.side}: loading")
            try:
                child = alive.enter_context(Child(one.side, settings, None if one.side == "resident" else limit))
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
                before = disk_roof(files, min(row_bytes, PART_BYTES), THREADS, seed=2 * number)
                try:
                    if one.side == "ours":
                        one.reads.append(child.do("read", seconds=1.5, seed=number)["bandwidth"])
                    one.answers.append(child.do("ask", **work.request(number), new_tokens=effort.new_tokens))
                except SideFailed as error:
                    one.failed = str(error)
                    say(str(error))
                    continue
                after = disk_roof(files, min(row_bytes, PART_BYTES), THREADS, seed=2 * number + 1)
                one.roofs.append((before + after) / 2)
                answer = one.answers[-1]
                say(
                    f"{one.side}: request {number}: first token after {answer['ttft_s']:.2f} s, then "
                    f"{answer['decode_s'] / (len(answer['tokens']) - 1) * 1e3:.0f} ms a token"
                )
        for one in found:
            if one.side in children and not one.failed:
                child = children[one.side]
                one.peak_over_baseline = child.do("memory")["peak_bytes"] - child.baseline_bytes
    return found
