"""What remembered usage gains at the second start: with the right memory, a mixed one, a wrong one, and none.

    python benchmarks/usage.py MODEL --texts TEXTS.json           {language: {"record": [page, ...], "evaluate": [...]}}

A first start reads pages of one language (Italian), of another (Japanese), or of both in turns, and is closed: that is
the memory. Then each second start is a model loaded anew, whose slots are filled while nothing runs (a person types)
or which is asked at once; it reads a window of an Italian page that no start has seen: a prompt of 48 tokens, then the
next 256 one at a time. A quarter of the experts are resident. Nothing is written outside of a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from profiles import pieces, windows_of
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

import moe_offload
from moe_offload.apps.generate.clock import Clock
from moe_offload.cache.counters import Stats
from moe_offload.plan import prepare
from moe_offload.plan.budget import budget_for

PROMPT = 48
MARKS = (8, 32, 256)  # tokens after the prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--right", default="it")
    parser.add_argument("--wrong", default="ja")
    parser.add_argument("--residency", type=float, default=0.25)
    parser.add_argument("--memory-tokens", type=int, default=4096, help="tokens of each first start")
    parser.add_argument("--starts", default="none,right,right-at-once,mixed,wrong", help="by commas, these or others")
    options = parser.parse_args()
    logging.disable_progress_bar()
    folder = tempfile.mkdtemp()
    prepare.usage_folder = lambda: Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = json.loads(options.texts.read_text(encoding="utf-8"))
    plan = moe_offload.make_plan(options.model, "1GB")
    budget = budget_for(options.residency, plan.layers, plan.costs)

    def ids_of(language: str, part: str) -> list[Tensor]:
        return [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts[language][part]]

    right, wrong = (pieces(ids_of(name, "record")) for name in (options.right, options.wrong))
    both = [piece for pair in zip(right, wrong, strict=False) for piece in pair]
    memories = {"right": right, "mixed": both, "wrong": wrong}
    for name, read in memories.items():
        if name in options.starts:
            first_start(options.model, budget, name, read, options.memory_tokens)
    windows = windows_of(ids_of(options.right, "evaluate"))

    print(
        f"{options.model}, {options.residency:.0%} resident, {len(windows)} windows of {PROMPT} + {MARKS[-1]} tokens,"
    )
    print(f"memory of {options.memory_tokens} tokens, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    columns = [f"hits, first {n} after it" for n in MARKS]
    columns = ["second start", "hits, prompt", *columns, "read for the prompt", "read ahead of it", "read in all"]
    columns.append("first token after, ms")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for start in options.starts.split(","):
        memory, at_once = start.removesuffix("-at-once"), start.endswith("-at-once")
        profile = "off" if memory == "none" else memory
        found = [second_start(options.model, budget, profile, window, at_once) for window in windows]
        print(f"| {start} | " + " | ".join(row(found)) + " |", flush=True)


def first_start(model: str, budget: int, workload: str, read: Sequence[Tensor], tokens: int) -> None:
    loaded: Any = moe_offload.from_pretrained(model, budget, profile=workload)
    with loaded.moe_offload, torch.no_grad():
        for piece in read:
            if tokens > 0:
                loaded(piece[:, :tokens], use_cache=False)
                tokens -= piece.shape[1]


@torch.no_grad()
def second_start(model: str, budget: int, profile: str, window_1T: Tensor, at_once: bool) -> dict[str, Any]:
    """Counters at each mark, and the time of the prompt without compiling."""
    loaded: Any = moe_offload.from_pretrained(model, budget, profile=profile)
    with loaded.moe_offload as handle, Clock() as clock:
        if not at_once and profile != "off":
            wait_until_full(handle)
        begun = clock()
        past = loaded(window_1T[:, :PROMPT], use_cache=True).past_key_values
        first_s = clock() - begun
        marks = [handle.stats()]
        for t in range(PROMPT, PROMPT + MARKS[-1]):
            past = loaded(window_1T[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
            if t - PROMPT + 1 in MARKS:
                marks.append(handle.stats())
        return {"marks": marks, "first_s": first_s}


def wait_until_full(handle: Any) -> None:
    until = time.monotonic() + 30
    while any(layer.resident < layer.slots for layer in handle.stats().layers) and time.monotonic() < until:
        time.sleep(0.01)


def row(found: Sequence[dict[str, Any]]) -> list[str]:
    """Hits are of all windows together, sizes their mean, the time their median."""
    first: list[Stats] = [one["marks"][0] for one in found]
    spans = [first] + [[one["marks"][i] - one["marks"][0] for one in found] for i in range(1, len(MARKS) + 1)]
    rates = [sum(stats.hits for stats in span) / sum(stats.requests for stats in span) for span in spans]
    sizes = [
        statistics.mean(stats.bytes_read for stats in first),
        statistics.mean(stats.prewarm_bytes for stats in first),
        statistics.mean(one["marks"][-1].moved_bytes for one in found),
    ]
    milliseconds = statistics.median(one["first_s"] for one in found) * 1e3
    return [f"{rate:.1%}" for rate in rates] + [f"{size / 1e6:.2f} MB" for size in sizes] + [f"{milliseconds:.0f}"]


if __name__ == "__main__":
    main()
