"""From what the sides did to the result of a bench: medians, rates, and ratios over the roofs, as plain JSON values."""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ...cache.belady import belady_hits
from .devices import DEVICES
from .roofs.bounds import find_bounds, traffic_over_roof
from .workload import OURS, Measured, Workload, count_steps, token_s

#: What ours is compared with, and the name of that ratio.
SPEEDUPS = {
    "cpu": {
        "accelerate": "speedup_over_accelerate_disk",
        "mmap": "speedup_over_mmap",
        "llama.cpp": "speedup_over_llama_cpp",
    },
    "cuda": {"accelerate": "speedup_over_accelerate", "ours-host": "speedup_over_host"},
}
ROOFS = {"cpu": "disk_bytes_per_s", "cuda": "link_bytes_per_s"}


def result_of(
    work: Workload, measured: Sequence[Measured], together: bool, notes: Sequence[str], details: dict[str, float]
) -> dict[str, Any]:
    """`together`: the resident model took turns with ours. `details` are what else is known of the roof."""
    sides = _in_order(measured)
    roofs = [roof for one in measured for roof in one.roofs]
    answered = [one for one in sides if one.answers]
    resident = next((one for one in answered if one.side == "resident"), None)
    routings = [one.loaded.get("routing") for one in measured]
    return {
        "model": str(work.folder),
        "date": datetime.date.today().isoformat(),
        "device": work.device,
        "machine": {**describe_machine(), **DEVICES[work.device]().facts()},
        "plans": [
            {"asked": asked, "budget_bytes": plan.budget_bytes, "residency": plan.residency}
            for asked, plan in work.plans.items()
        ],
        "row_bytes": work.row_bytes,
        "touched_bytes": work.touched_bytes,
        "prompt_tokens": len(work.request(0, 1)["prompt"]),
        "new_tokens": work.new_tokens,
        "left_out": work.request(0, work.new_tokens)["left_out"],
        "requests": work.requests,
        "prompt": "given" if work.prompt else "random tokens",
        "packed": work.packed,
        "forced": work.forced,
        "routing": next(filter(None, routings), "the model's own router"),
        "resident_and_ours_took_turns": together,
        "tokens_of": answered[0].side if answered else None,
        "tokens_agree": [_agreement(answered[0], other, work.forced) for other in answered[1:]],
        "rows": [_row(one, work, sides) | _over_memory(one, work, details) for one in sides],
        "roofs": {
            ROOFS[work.device]: statistics.median(roofs or [0.0]),
            **details,
            "resident_token_s": resident and resident.median(token_s),
        },
        "notes": list(notes),
    }


def _in_order(measured: Sequence[Measured]) -> list[Measured]:
    """The resident model first, all its turns as one side; then from the smallest budget to the largest."""
    turns = [one for one in measured if one.side == "resident"]
    others = [one for one in measured if one.side != "resident"]
    order = [*OURS, *dict.fromkeys(one.side for one in others)]
    others.sort(key=lambda one: (one.plan.budget_bytes, order.index(one.side)))
    if not turns:
        return others
    answers = [answer for one in turns for answer in one.answers]
    roofs = [roof for one in turns for roof in one.roofs]
    return [replace(turns[-1], answers=answers, roofs=roofs), *others]


def _agreement(first: Measured, other: Measured, forced: bool) -> dict[str, Any]:
    """How many tokens of the other side are those of the first, as far as both answered; up to where they part, unless
    both were told how to go on."""
    agree = total = 0
    for one, another in zip(first.answers, other.answers, strict=False):
        pairs = list(zip(one["tokens"], another["tokens"], strict=False))
        total += len(pairs)
        parted = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        agree += sum(a == b for a, b in pairs) if forced else parted
    return {"side": other.side, "asked": other.asked, "agree": agree, "of": total}


def _row(one: Measured, work: Workload, sides: Sequence[Measured]) -> dict[str, Any]:
    row: dict[str, Any] = {"side": one.side, "asked": one.asked, "limited": one.limited, "failed": one.failed}
    if one.side != "resident":
        row |= {"budget_bytes": one.plan.budget_bytes, "residency": one.plan.residency}
    if not one.answers:
        return row
    row |= {
        "tokens_per_s": 1 / one.median(token_s),
        "ttft_s": one.median(lambda a: a["ttft_s"]),
        "prefill_tokens_per_s": len(work.request(0, 1)["prompt"]) / one.median(lambda a: a["ttft_s"]),
        "load_s": one.loaded["load_s"],
    }
    steps_s = [step_s for answer in one.answers for step_s in answer.get("steps_s", ())]
    if len(steps_s) > 1:
        row["token_s_p5_p50_p95"] = np.percentile(steps_s, (5, 50, 95)).tolist()
    if "disk_bytes" in one.answers[0]["decode"]:
        decoded = sum(answer["decode"]["disk_bytes"] for answer in one.answers)
        row["bytes_per_token"] = decoded / sum(count_steps(answer) for answer in one.answers)
        row["missed_s_per_token"] = row["bytes_per_token"] / statistics.median(one.roofs)
    if one.peak_with_cache_bytes is not None:
        row["peak_with_cache_bytes"] = one.peak_with_cache_bytes
    if one.memory:
        row |= {**one.memory, "peak_bytes": one.memory["peak_bytes"] - one.baseline_bytes}
    if one.answers[0]["peaks_bytes"][0] is not None:
        row["prefill_peak_bytes"] = max(answer["peaks_bytes"][0] for answer in one.answers)
        row["decode_peak_bytes"] = max(max(answer["peaks_bytes"][1:]) for answer in one.answers)
    if one.side in OURS:
        decode = [answer["decode"] for answer in one.answers]
        counted = sum(count_steps(answer) for answer in one.answers)
        hits, misses = (sum(d[name] for d in decode) for name in ("hits", "misses"))
        row |= {
            "hit_rate": hits / max(hits + misses, 1),
            **({"belady_hit_rate": _belady(one)} if one.answers[0]["used"] is not None else {}),
            "bytes_per_token": sum(d["bytes_read"] for d in decode) / counted,
            "misses_per_token": misses / counted,
            "stall_s_per_token": sum(d["stall_s"] for d in decode) / counted,
            "prefill_bytes": one.median(lambda a: a["prefill"]["bytes_read"]),
            "prefill_stall_s": one.median(lambda a: a["prefill"]["stall_s"]),
            **find_bounds(one),
            "traffic_over_roof": traffic_over_roof(one),
            **_speedups(one, work, sides),
        }
        if one.reads:
            pairs = zip(one.reads, one.roofs, strict=False)
            row["read_bandwidth_over_raw"] = statistics.median(read / roof for read, roof in pairs)
    return row


def _over_memory(one: Measured, work: Workload, details: dict[str, float]) -> dict[str, float]:
    """Our time for a token over what its weights take to be read from memory."""
    if not one.answers or "memory_bytes_per_s" not in details:
        return {}
    return {"decode_over_memory": one.median(token_s) / (work.touched_bytes / details["memory_bytes_per_s"])}


def _belady(one: Measured) -> float:
    """The best hit rate that any policy could have had in the steps that count, all that was before them included.

    A prompt asks for more than fits, and then leaves what is wanted the soonest: as Belady's rule has it.
    """
    hits = requests = 0
    answers = [*([one.warm_up] if one.warm_up else []), *one.answers]
    for layer, slots in enumerate(one.loaded["slots"]):
        events: list[list[int]] = []
        counted: list[bool] = []
        for answer in answers:
            prompt, *decoded = answer["used"][layer]
            events += [prompt, *decoded]
            counted += [False, *(answer is not one.warm_up and i >= answer["left_out"] for i in range(len(decoded)))]
        found = belady_hits([dict.fromkeys(event, 1) for event in events], slots)
        hits += sum(hit for hit, counts in zip(found, counted, strict=True) if counts)
        requests += sum(len(event) for event, counts in zip(events, counted, strict=True) if counts)
    return hits / max(requests, 1)


def _speedups(one: Measured, work: Workload, sides: Sequence[Measured]) -> dict[str, float]:
    """Times the others at the same budget."""
    names = SPEEDUPS[work.device]
    others = [other for other in sides if other.asked == one.asked and other.side in names and other.answers]
    return {names[other.side]: other.median(token_s) / one.median(token_s) for other in others if other is not one}


def describe_machine() -> dict[str, Any]:
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
