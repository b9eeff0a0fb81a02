"""What a profile is worth: a cold start, the right profile, the oracle's and a wrong one, on real text.

    python benchmarks/profiles.py MODEL --texts TEXTS.json        {language: {"record": [page, ...], "evaluate": [...]}}

The profile is of Italian pages, or Japanese ones; prompts are windows of Italian pages that no profile has seen: 48
tokens at once, then the next 256 of the page one at a time, as in decoding. The oracle's profile is of that very
window. A quarter of the experts are resident. Each start has the same model and compiled graph, and a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_offload
from moe_offload.cache import POLICIES
from moe_offload.cache.layer_cache import LayerCache
from moe_offload.observe.profile import Profile
from moe_offload.observe.profile_stats import most_wanted, uses_per_token
from moe_offload.plan.budget import budget_for
from moe_offload.runtime.prewarm import prewarm_slots

PROMPT, DECODED, WINDOWS = 48, 256, 12
PARTS = {"prompt": slice(0, 1), "next 8": slice(1, 9), "next 32": slice(1, 33), "all 256": slice(1, 257)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--language", default="it")
    parser.add_argument("--wrong", default="ja")
    parser.add_argument("--residency", type=float, default=0.25)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = json.loads(options.texts.read_text(encoding="utf-8"))

    def ids_of(language: str, part: str) -> list[Tensor]:
        return [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts[language][part]]

    resident: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    right = moe_offload.record_profile(resident, pieces(ids_of(options.language, "record")))
    wrong = moe_offload.record_profile(resident, pieces(ids_of(options.wrong, "record")))
    windows = windows_of(ids_of(options.language, "evaluate"))
    oracles = [moe_offload.record_profile(resident, window) for window in windows]
    plan = moe_offload.make_plan(resident, "1GB")
    budget = budget_for(options.residency, plan.layers, plan.costs)
    model: Any = moe_offload.from_pretrained(options.model, budget, profile="off")
    run(model, windows[0], None)  # compiles

    print(f"{options.model}, {options.residency:.0%} resident, {len(windows)} windows of {PROMPT} + {DECODED} tokens\n")
    print("| start | " + " | ".join(f"hits, {part}" for part in PARTS) + " | read before the first token | pre-warmed "
          "| first token after, ms | with pre-warming, ms |")  # fmt: skip
    print("|---|" + "---|" * 8)
    starts: dict[str, Sequence[Profile | None]] = {
        "empty": [None] * len(windows),
        f"profile of {options.language}": [right] * len(windows),
        "oracle's profile": oracles,
        f"profile of {options.wrong}": [wrong] * len(windows),
    }
    for name, profiles in starts.items():
        found = [run(model, window, profile) for window, profile in zip(windows, profiles, strict=True)]
        shares = [sum(f["hits"][part] for f in found) / sum(f["asked"][part] for f in found) for part in PARTS]
        columns = [f"{share:.1%}" for share in shares]
        for key, unit in (("read", 1e6), ("warmed", 1e6)):
            columns.append(f"{statistics.mean(f[key] for f in found) / unit:.2f} MB")
        first, warm = (statistics.median(f[key] for f in found) * 1e3 for key in ("first_s", "warm_s"))
        print(f"| {name} | " + " | ".join([*columns, f"{first:.0f}", f"{first + warm:.0f}"]) + " |", flush=True)


def pieces(pages: Sequence[Tensor]) -> list[Tensor]:
    return [piece for page in pages for piece in page.split(512, dim=1)]


def windows_of(pages: Sequence[Tensor]) -> list[Tensor]:
    size = PROMPT + DECODED
    each = -(-WINDOWS // len(pages))
    found = []
    for page in pages:
        room = page.shape[1] - size
        begins = sorted({room * i // max(each - 1, 1) for i in range(each)}) if room >= 0 else []
        found += [page[:, begin : begin + size] for begin in begins]
    return found


@torch.no_grad()
def run(model: Any, window_1T: Tensor, profile: Profile | None) -> dict[str, Any]:
    handle = model.moe_offload
    runtime = handle._runtime
    for layer in runtime.layers:  # as after optimize(): empty slots, a policy that knows nothing
        old = layer.arrivals.cache
        policy = POLICIES["successors"](old.num_experts, 32.0)
        if profile is not None:
            policy.seed(uses_per_token(profile, layer.moe.index))
        layer.arrivals.cache = LayerCache(old.num_experts, old.slots, policy, old.name)
    begun = time.perf_counter()
    if profile is not None:
        prewarm_slots(runtime, most_wanted(profile, [layer.cache.slots for layer in runtime.layers]))
    warm_s = time.perf_counter() - begun
    handle.start_trace()
    begun = time.perf_counter()
    past = model(window_1T[:, :PROMPT], use_cache=True).past_key_values
    first_s = time.perf_counter() - begun
    read = handle.stats().bytes_read
    for t in range(PROMPT, PROMPT + DECODED):
        past = model(window_1T[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
    steps = handle.forwards()
    return {
        "hits": {part: sum(step.hits for step in steps[span]) for part, span in PARTS.items()},
        "asked": {part: sum(step.hits + step.misses for step in steps[span]) for part, span in PARTS.items()},
        "read": read,
        "warmed": handle.stats().prewarm_bytes,
        "warm_s": warm_s,
        "first_s": first_s,
    }


if __name__ == "__main__":
    main()
