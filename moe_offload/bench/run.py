"""The bench: sides that answer the same requests in turn, with the roofs measured beside them.

    roof    what a process that only reads gets from this disk, before and after each request of ours
    pairs   resident and ours stay alive together where both fit, and take turns request by request
    then    accelerate and mmap, each alone, under the memory limit that ours has

Every side answers the same prompts, over the same recorded routing, and must answer with the same tokens.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ..belady import belady_hits
from ..checkpoint import shard_files
from ..errors import ConfigError
from ..pack import pack_checkpoint
from ..plan import Plan
from ..stores.reads import PART_BYTES
from ..transfer import THREADS
from .child import Child, SideFailed
from .contenders import PACKED, SIDES, drop_cache, write_mapped
from .request import random_prompt
from .roofs import disk_roof

SLACK_BYTES = 64 * 10**6  # what a process may hold beyond its budget, plus one row
LEAST_LIMIT = 600 * 10**6  # libraries and tracing take some 150 MB however small the model


@dataclass(frozen=True)
class Effort:
    """How much a side is asked: slow ones are measured on less."""

    requests: int
    new_tokens: int
    warm_up_tokens: int  # -1: no warm-up request


EFFORT = {"accelerate": Effort(1, 2, -1), "mmap": Effort(1, 12, 8)}


@dataclass(frozen=True)
class Workload:
    """`requests` requests of `prompt_tokens` and `new_tokens`, after one to warm up."""

    folder: Path
    plan: Plan
    vocabulary: int
    routing: str | None = None
    prompt: Sequence[int] | None = None
    prompt_tokens: int = 512
    new_tokens: int = 32
    requests: int = 3
    packed: bool = False

    def effort(self, side: str) -> Effort:
        least = EFFORT.get(side)
        if least is None:
            return Effort(self.requests, self.new_tokens, self.new_tokens)
        return Effort(least.requests, min(least.new_tokens, self.new_tokens), least.warm_up_tokens)

    def request(self, number: int) -> dict[str, Any]:
        """The prompt of one request and the row of the trace it begins at."""
        prompt = list(self.prompt or random_prompt(self.vocabulary, self.prompt_tokens, number))
        return {"prompt": prompt, "row": number * (len(prompt) + self.new_tokens)}


@dataclass
class Measured:
    """What one side did. `answers` leaves the warm-up out; `roofs` are bytes/s beside each answer."""

    side: str
    answers: list[dict[str, Any]] = field(default_factory=list)
    warm_up: dict[str, Any] | None = None
    roofs: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    peak_over_baseline: int = 0
    limited: str = ""
    failed: str = ""

    def median(self, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(answer) for answer in self.answers)


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
    return _result(work, measured, together)


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


def _token_s(answer: dict[str, Any]) -> float:
    return float(answer["decode_s"] / max(len(answer["tokens"]) - 1, 1))


def _result(work: Workload, measured: dict[str, Measured], together: bool) -> dict[str, Any]:
    plan = work.plan
    ours, resident = measured.get("ours"), measured.get("resident")
    rows = [_row(one, work) for one in measured.values()]
    bandwidth = statistics.median([roof for one in measured.values() for roof in one.roofs] or [0.0])
    return {
        "model": str(work.folder),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "budget_bytes": plan.budget_bytes,
        "residency": plan.residency,
        "row_bytes": max(layer.row_bytes for layer in plan.layers),
        "prompt_tokens": len(work.request(0)["prompt"]),
        "new_tokens": work.new_tokens,
        "requests": work.requests,
        "prompt": "given" if work.prompt else "random tokens",
        "packed": work.packed,
        "routing": (ours or next(iter(measured.values()))).loaded.get("routing") or "the model's own router",
        "resident_and_ours_took_turns": together,
        "tokens_of": next(iter(measured)),
        "tokens_differ": _differing(list(measured.values())),
        "rows": rows,
        "roofs": {"disk_bytes_per_s": bandwidth, "resident_token_s": resident and resident.median(_token_s)},
        "ratios": _ratios(work, measured),
    }


def _differing(sides: list[Measured]) -> list[str]:
    """The sides whose tokens are not those of the first one, as far as both answered."""
    first, *others = ([(one.side, answer["tokens"]) for answer in one.answers] for one in sides)
    pairs = [pair for other in others for pair in zip(first, other, strict=False)]
    return list(dict.fromkeys(side for (_, a), (side, b) in pairs if a[: len(b)] != b[: len(a)]))


def _row(one: Measured, work: Workload) -> dict[str, Any]:
    row: dict[str, Any] = {"side": one.side, "limited": one.limited, "failed": one.failed}
    if not one.answers:
        return row
    row |= {
        "tokens_per_s": 1 / one.median(_token_s),
        "ttft_s": one.median(lambda a: a["ttft_s"]),
        "prefill_tokens_per_s": work.prompt_tokens / one.median(lambda a: a["ttft_s"]),
        "peak_bytes": one.peak_over_baseline,
        "load_s": one.loaded["load_s"],
    }
    if one.side == "ours":
        decode = [answer["decode"] for answer in one.answers]
        steps = sum(len(answer["tokens"]) - 1 for answer in one.answers)
        hits, misses = (sum(d[name] for d in decode) for name in ("hits", "misses"))
        row |= {
            "hit_rate": hits / max(hits + misses, 1),
            "belady_hit_rate": _belady(one),
            "bytes_per_token": sum(d["bytes_read"] for d in decode) / steps,
            "stall_s_per_token": sum(d["stall_s"] for d in decode) / steps,
            "prefill_bytes": one.median(lambda a: a["prefill"]["bytes_read"]),
            "prefill_stall_s": one.median(lambda a: a["prefill"]["stall_s"]),
        }
    return row


def _belady(one: Measured) -> float:
    """The best hit rate that any policy could have had in the measured decode steps, the warm-up's included as past."""
    hits = requests = 0
    answers = [*([one.warm_up] if one.warm_up else []), *one.answers]
    for layer, slots in enumerate(one.loaded["slots"]):
        events: list[list[int]] = []
        scored = 0
        for answer in answers:
            steps = answer["used"][layer][1:]  # the first is the prompt
            scored = len(events) if answer is one.answers[0] else scored
            events += steps
        found = belady_hits(events, slots)[scored:]
        hits += sum(found)
        requests += sum(len(event) for event in events[scored:])
    return hits / max(requests, 1)


def _ratios(work: Workload, measured: dict[str, Measured]) -> dict[str, float | None]:
    """Ours against the roofs and the others. Below 1.0 a roof cannot be; None where a side is missing."""
    ours, resident = measured.get("ours"), measured.get("resident")
    ratios: dict[str, float | None] = dict.fromkeys(
        (
            "decode_over_roof",
            "prefill_over_roof",
            "speedup_over_accelerate_disk",
            "speedup_over_mmap",
            "read_bandwidth_over_raw",
        )
    )
    if ours is None or not ours.answers:
        return ratios
    if resident is not None and len(resident.answers) == len(ours.answers):
        decode, prefill = [], []
        for mine, theirs, roof in zip(ours.answers, resident.answers, ours.roofs, strict=True):
            steps = len(mine["tokens"]) - 1
            decode.append(_token_s(mine) / max(_token_s(theirs), mine["decode"]["bytes_read"] / steps / roof))
            prefill.append(mine["ttft_s"] / max(theirs["ttft_s"], mine["prefill"]["bytes_read"] / roof))
        ratios |= {"decode_over_roof": statistics.median(decode), "prefill_over_roof": statistics.median(prefill)}
    for side, name in (("accelerate", "speedup_over_accelerate_disk"), ("mmap", "speedup_over_mmap")):
        other = measured.get(side)
        if other is not None and other.answers:
            ratios[name] = other.median(_token_s) / ours.median(_token_s)
    if ours.reads:
        ratios["read_bandwidth_over_raw"] = statistics.median(
            read / roof for read, roof in zip(ours.reads, ours.roofs, strict=False)
        )
    return ratios


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
