"""`moe-offload bench --device cuda`, once per shape and share of resident experts, and one table of all of them.

`gpu.py` runs `commands()` and then writes `markdown()`. A figure stands beside the bound that it is measured against:
the larger of the resident model's time and the missed bytes over the link.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 400
LAYERS = 6
#: Shape, the recorded routing that goes with it, and the shares: what the goals are set for comes first.
SHAPES = (
    ("qwen3-30b-a3b", "qwen3-30b-a3b_k6_bigmoeonedge.npz", (50, 25, 100, 10)),
    ("gpt-oss-20b", "gpt-oss-20b_decode_dev.npz", (50, 25)),
)
TRACES = (HERE.parent.parent / "shared" / "traces", HERE.parent / "shared" / "traces")
GB = 1e9


def commands(out: Path, folders: Sequence[Path] = TRACES) -> dict[str, list[str]]:
    """What to run, by name; each writes its result into `out`. Without a trace at hand, routers choose themselves."""
    found = {}
    for shape, trace, shares in SHAPES:
        routing = next((folder / trace for folder in folders if (folder / trace).is_file()), None)
        for share in shares:
            found[f"bench, {shape}, {share} % resident"] = [
                *(sys.executable, "-m", "moe_offload", "bench", f"synthetic:{shape}", "--layers", str(LAYERS)),
                *("--device", "cuda", "--residency", f"{share}%", "--new-tokens", "128"),
                *(("--routing", str(routing)) if routing else ()),
                *("--json", str(out.resolve() / f"bench_{shape}_{share}.json")),
            ]
    return found


def results(out: Path) -> list[dict[str, Any]]:
    """What has been written into `out`, in the order of `SHAPES`, least resident first."""
    files = [out / f"bench_{shape}_{share}.json" for shape, _, shares in SHAPES for share in sorted(shares)]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """One line for each shape and share. Empty without results."""
    if not found:
        return ""
    first = found[0]
    machine = first["machine"]
    lines = [
        f"# `moe-offload bench --device cuda`, {LAYERS} layers, random weights: {machine['gpu']}, {first['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; medians of {first['requests']} requests of {first['prompt_tokens']} + "
        f"{first['new_tokens']} tokens. The bound is max(resident time, missed bytes / link); the link is the faster "
        "of copy engine and kernel. Memory is torch.cuda.max_memory_allocated, loading included.",
        "",
        "| shape, resident | resident tokens/s | ours | of resident | of the bound | misses over link | host decides |"
        " accelerate | prefill of its bound | hits | link GB/s, engine, kernel | peak GB (budget) | tokens |",
        "|" + "---|" * 13,
        *(_line(one) for one in found),
        "",
        *dict.fromkeys(f"Routing of {_shape(one)}: {one['routing']}." for one in found),
        *(
            f"{_shape(one)}, {_share(one)}: {row['side']} failed: {row['failed']}"
            for one in found
            for row in one["rows"]
            if row["failed"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _line(one: dict[str, Any]) -> str:
    rows = {row["side"]: row for row in one["rows"]}
    ours, ratios, roofs = rows.get("ours", {}), one["ratios"], one["roofs"]

    def speed(side: str) -> str:
        return _shown(rows.get(side, {}).get("tokens_per_s"), ".1f")

    def times(ratio: str) -> str:
        return f" ({_shown(ratios[ratio], '.1f')}x)"

    peak = ours.get("peak_bytes")
    cells = (
        f"{_shape(one)}, {_share(one)}",
        speed("resident"),
        speed("ours"),
        _shown(ratios["share_of_resident_speed"], ".0%"),
        _shown(_inverse(ratios["decode_over_roof"]), ".0%"),
        _shown(ratios["miss_traffic_over_link"], ".0%"),
        speed("ours-host") + times("speedup_over_ours_host"),
        speed("accelerate") + times("speedup_over_accelerate_cpu"),
        _shown(_inverse(ratios["prefill_over_roof"]), ".0%"),
        _shown(ours.get("hit_rate"), ".1%"),
        f"{roofs['copy_engine_bytes_per_s'] / GB:.1f}, {roofs['kernel_bytes_per_s'] / GB:.1f}",
        f"{_shown(peak and peak / GB, '.2f')} ({one['budget_bytes'] / GB:.2f})",
        f"differ: {', '.join(one['tokens_differ'])}" if one["tokens_differ"] else "the same",
    )
    return "| " + " | ".join(cells) + " |"


def _shape(one: dict[str, Any]) -> str:
    return Path(one["model"]).name


def _share(one: dict[str, Any]) -> str:
    return f"{one['residency']:.0%}"


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1 / ratio


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
