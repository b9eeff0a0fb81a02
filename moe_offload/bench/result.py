"""From what the sides did to the result of a bench: medians, rates, and ratios over the roofs, as plain JSON values."""

from __future__ import annotations

import datetime
import platform
import statistics
from pathlib import Path
from typing import Any

import psutil

from ..belady import belady_hits
from .workload import Measured, Workload


def _token_s(answer: dict[str, Any]) -> float:
    return float(answer["decode_s"] / max(len(answer["tokens"]) - 1, 1))


def result_of(work: Workload, measured: dict[str, Measured], together: bool) -> dict[str, Any]:
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
