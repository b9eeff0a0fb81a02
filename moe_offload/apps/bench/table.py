"""The result of a bench as a person reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...config.sizes import format_size
from .sides.names import LLAMA

Row = dict[str, Any]
Cell = Callable[[Row], str]


def format_table(result: dict[str, Any]) -> str:
    several = len(result["plans"]) > 1
    columns = {"": _name if several else lambda row: row["side"], **COLUMNS[result["device"]]}
    grid = [tuple(columns), *(tuple(cell(row) for cell in columns.values()) for row in result["rows"])]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in grid
    ]
    failed = [
        f"{_name(row) if several else row['side']} failed: {row['failed']}" for row in result["rows"] if row["failed"]
    ]
    return "\n".join([*_head(result), "", *lines, "", *_ratios(result, several), *failed, *result["notes"]])


def _shown(key: str, form: str, scale: float = 1.0) -> Cell:
    return lambda row: format(row[key] * scale, form) if key in row else ""


def _size(key: str) -> Cell:
    return lambda row: format_size(int(row[key])) if key in row else ""


def _share(key: str) -> Cell:
    """A cell with the share of the bound that is reached: 1 over the time, which `key` has as a multiple
    of the bound."""
    return lambda row: f"{1 / row[key]:.0%}" if key in row else ""


def _ms_per_token(form: str) -> Cell:
    return lambda row: format(1e3 / row["tokens_per_s"], form) if "tokens_per_s" in row else ""


def _percentile(which: int) -> Cell:
    return lambda row: format(row["token_s_p5_p50_p95"][which] * 1e3, ".0f") if "token_s_p5_p50_p95" in row else ""


def _name(row: Row) -> str:
    return row["side"] if row["side"] == "resident" else f"{row['side']} {row['asked']}"


SPEED: dict[str, Cell] = {"tokens/s": _shown("tokens_per_s", ".2f")}
CACHE: dict[str, Cell] = {
    "hits": _shown("hit_rate", ".1%"),
    "Belady": _shown("belady_hit_rate", ".1%"),
    "read/token": _size("bytes_per_token"),
}
COLUMNS: dict[str, dict[str, Cell]] = {
    "cpu": {
        **SPEED,
        "ms/token": _ms_per_token(".0f"),
        "p5": _percentile(0),
        "p50": _percentile(1),
        "p95": _percentile(2),
        "TTFT s": _shown("ttft_s", ".2f"),
        **CACHE,
        "disk ms": _shown("missed_s_per_token", ".0f", 1e3),
        "stall ms": _shown("stall_s_per_token", ".1f", 1e3),
        "peak memory": _size("peak_bytes"),
        "with cache": _size("peak_with_cache_bytes"),
        "load s": _shown("load_s", ".1f"),
        "limit": lambda row: row["limited"],
    },
    "cuda": {
        **SPEED,
        "ms/token": _ms_per_token(".2f"),
        "bound ms": _shown("decode_bound_s", ".2f", 1e3),
        "of bound": _share("decode_over_roof"),
        "of resident": _shown("share_of_resident_speed", ".0%"),
        "of link": _shown("traffic_over_roof", ".0%"),
        "TTFT ms": _shown("ttft_s", ".0f", 1e3),
        "bound": _shown("prefill_bound_s", ".0f", 1e3),
        "of it": _share("prefill_over_roof"),
        **CACHE,
        "budget": _size("budget_bytes"),
        "peak, decode": _size("decode_peak_bytes"),
        "peak, prompt": _size("prefill_peak_bytes"),
        "reserved": _size("reserved_bytes"),
        "load s": _shown("load_s", ".1f"),
    },
}
RATIOS = {
    "cpu": {
        "decode_over_roof": "decode, time over max(resident, missed bytes / disk)",
        "prefill_over_roof": "prefill, time over max(resident, missed bytes / disk)",
        "decode_over_memory": "decode, time over bytes touched / memory",
        "speedup_over_llama_cpp": "decode, times llama.cpp",
        "speedup_over_accelerate_disk": "decode, times accelerate's disk offload",
        "speedup_over_mmap": "decode, times plain mmap",
        "read_bandwidth_over_raw": "our reads over raw reads of the same size and depth",
    },
    "cuda": {
        "decode_over_roof": "decode, time over max(resident, missed bytes / link)",
        "prefill_over_roof": "prefill, time over max(resident, missed bytes / link)",
        "speedup_over_accelerate": "decode, times accelerate's cpu offload",
        "speedup_over_host": "decode, times ours where the host decides",
    },
}


def _head(result: dict[str, Any]) -> list[str]:
    machine, on_gpu = result["machine"], result["device"] == "cuda"
    gpu = (
        f", {machine['gpu']}, {format_size(machine['gpu_memory_bytes'])}, Triton {machine['triton']}" if on_gpu else ""
    )
    plans = [
        f"budget {format_size(plan['budget_bytes'])}: {plan['residency']:.0%} of the experts resident, row "
        f"{format_size(result['row_bytes'])}"
        for plan in result["plans"]
    ]
    ours = (
        "all rows in pinned RAM"
        if on_gpu
        else f"ours reads {'a packed copy' if result['packed'] else 'the checkpoint itself'}"
    )
    left_out = f", the first {result['left_out']} decoded tokens of each left out" if result["left_out"] else ""
    return [
        f"{result['model']}, {result['date']}",
        f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['memory_bytes'])}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}{gpu}",
        *plans,
        f"{result['requests']} requests of {result['prompt_tokens']} + {result['new_tokens']} tokens "
        f"({result['prompt']}){left_out}, medians; {ours}",
        f"routing: {result['routing']}",
        f"{_roof(result)}; {_agreement(result)}",
    ]


def _roof(result: dict[str, Any]) -> str:
    roofs = result["roofs"]
    if result["device"] == "cpu":
        disk, memory = (f"{format_size(int(roofs[f'{of}_bytes_per_s']))}/s" for of in ("disk", "memory"))
        token_s = result["touched_bytes"] / roofs["memory_bytes_per_s"]
        touched = f"a token touches {format_size(result['touched_bytes'])}, {token_s * 1e3:.0f} ms"
        return f"disk roof {disk}, memory roof {memory} ({touched})"
    engine, kernel = (format_size(int(roofs[f"{way}_bytes_per_s"])) for way in ("copy_engine", "kernel"))
    return (
        f"link roof {format_size(int(roofs['link_bytes_per_s']))}/s (copy engine {engine}/s, gather kernel {kernel}/s)"
    )


def _ratios(result: dict[str, Any], several: bool) -> list[str]:
    ours = [row for row in result["rows"] if row["side"] == "ours"] or [{"asked": ""}]
    heads = ["".ljust(55) + "".join(row["asked"].rjust(13) for row in ours)] if several else []
    lines = [
        f"{name:<55}" + "".join(f"{f'{row[key]:.2f}' if key in row else 'not measured':>13}" for row in ours)
        for key, name in RATIOS[result["device"]].items()
    ]
    return [*heads, *lines]


def _agreement(result: dict[str, Any]) -> str:
    if not result["tokens_agree"]:
        return "no two sides answered, so tokens are compared with nothing"
    parting = [one for one in result["tokens_agree"] if one["agree"] < one["of"]]
    first = result["tokens_of"]
    if not parting:
        return f"all sides gave the tokens of {first}"
    wrong = list(dict.fromkeys(one["side"] for one in parting if one["side"] != LLAMA))
    if result["device"] == "cpu" and wrong:
        return f"OTHER TOKENS than {first}: {', '.join(wrong)}"
    shares = ", ".join(f"{_name(one)} {one['agree']} of {one['of']}" for one in parting)
    until = "" if result["forced"] else ", until they part"
    return f"tokens as those of {first}, whose products round otherwise{until}: {shares}"
