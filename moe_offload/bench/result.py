"""From what the sides did to the result of a bench: medians, rates, and ratios over the roofs, as plain JSON values."""

from __future__ import annotations

import datetime
import platform
import statistics
from pathlib import Path
from typing import Any

import psutil

from ..belady import belady_hits
from .link import fastest
from .workload import Measured, Workload

#: Device -> the ratios of its result, and what they are.
RATIOS = {
    "cpu": {
        "decode_over_roof": "decode, time over max(resident, missed bytes / disk)",
        "prefill_over_roof": "prefill, time over max(resident, missed bytes / disk)",
        "speedup_over_accelerate_disk": "decode, times accelerate's disk offload",
        "speedup_over_mmap": "decode, times plain mmap",
        "read_bandwidth_over_raw": "our reads over raw reads of the same size and depth",
    },
    "cuda": {
        "decode_over_roof": "decode, time over max(resident, missed bytes / link)",
        "prefill_over_roof": "prefill, time over max(resident, missed bytes / link)",
        "share_of_resident_speed": "decode, share of the resident model's speed",
        "miss_traffic_over_link": "decode, missed bytes/s over the link",
        "speedup_over_accelerate_cpu": "decode, times accelerate's CPU offload",
        "speedup_over_ours_host": "decode, times ours where the host decides",
    },
}
SPEEDUPS = {
    "speedup_over_accelerate_disk": "accelerate",
    "speedup_over_accelerate_cpu": "accelerate",
    "speedup_over_mmap": "mmap",
    "speedup_over_ours_host": "ours-host",
}


def steps_of(answer: dict[str, Any]) -> int:
    """Decoded tokens that count."""
    return max(len(answer["tokens"]) - 1 - int(answer["left_out"]), 1)


def token_s(answer: dict[str, Any]) -> float:
    return float(answer["decode_s"] / steps_of(answer))


def result_of(
    work: Workload, measured: dict[str, Measured], together: bool, link: dict[str, float] | None
) -> dict[str, Any]:
    """`link`: what the link of a GPU gave, in bytes/s; None on a CPU, where each answer has a roof of its own."""
    plan = work.plan
    ours, resident = measured.get("ours"), measured.get("resident")
    rows = [_row(one, work) for one in measured.values()]
    if link is None:
        disk = statistics.median([roof for one in measured.values() for roof in one.roofs] or [0.0])
        roofs: dict[str, Any] = {"disk_bytes_per_s": disk}
    else:
        roofs = {f"{name}_bytes_per_s": link[name] for name in ("copy_engine", "kernel")}
        roofs["link_bytes_per_s"] = fastest(link)
    return {
        "model": str(work.folder),
        "date": datetime.date.today().isoformat(),
        "machine": machine(work.device),
        "device": work.device,
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
        "roofs": {**roofs, "resident_token_s": resident.median(token_s) if resident and resident.answers else None},
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
        "tokens_per_s": 1 / one.median(token_s),
        "ttft_s": one.median(lambda a: a["ttft_s"]),
        "prefill_tokens_per_s": work.prompt_tokens / one.median(lambda a: a["ttft_s"]),
        "peak_bytes": one.peak_over_baseline,
        "load_s": one.loaded["load_s"],
    }
    if one.loaded["slots"] is not None:
        decode = [answer["decode"] for answer in one.answers]
        steps = sum(steps_of(answer) for answer in one.answers)
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
        found = belady_hits(events, slots)
        hits += sum(hit for hit, counts in zip(found, counted, strict=True) if counts)
        requests += sum(len(event) for event, counts in zip(events, counted, strict=True) if counts)
    return hits / max(requests, 1)


def _ratios(work: Workload, measured: dict[str, Measured]) -> dict[str, float | None]:
    """Ours against the roofs and the others, in the order of RATIOS. Time over a roof cannot be below 1.0.

    None where a side is missing.
    """
    ours, resident = measured.get("ours"), measured.get("resident")
    ratios: dict[str, float | None] = dict.fromkeys(RATIOS[work.device])
    if ours is None or not ours.answers:
        return ratios
    if resident is not None and len(resident.answers) == len(ours.answers):
        decode, prefill = [], []
        for mine, theirs, roof in zip(ours.answers, resident.answers, ours.roofs, strict=True):
            missed = mine["decode"]["bytes_read"] / steps_of(mine)
            decode.append(token_s(mine) / max(token_s(theirs), missed / roof))
            prefill.append(mine["ttft_s"] / max(theirs["ttft_s"], mine["prefill"]["bytes_read"] / roof))
        ratios |= {"decode_over_roof": statistics.median(decode), "prefill_over_roof": statistics.median(prefill)}
        if work.device != "cpu":
            ratios["share_of_resident_speed"] = resident.median(token_s) / ours.median(token_s)
    for name in (name for name in ratios if name.startswith("speedup_over_")):
        other = measured.get(SPEEDUPS[name])
        if other is not None and other.answers:
            ratios[name] = other.median(token_s) / ours.median(token_s)
    if work.device != "cpu":
        ratios["miss_traffic_over_link"] = (
            ours.median(lambda a: a["decode"]["bytes_read"] / a["decode_s"]) / ours.roofs[0]
        )
    if ours.reads:
        ratios["read_bandwidth_over_raw"] = statistics.median(
            read / roof for read, roof in zip(ours.reads, ours.roofs, strict=False)
        )
    return ratios


def machine(device: str) -> dict[str, Any]:
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
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
