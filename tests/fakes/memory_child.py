"""Run in a process of its own by test_memory.py: load a checkpoint, generate, say how much memory it ever took.

    python -m tests.fakes.memory_child CHECKPOINT --budget 1GB     offloaded
    python -m tests.fakes.memory_child CHECKPOINT                  resident: the unmodified model

Prints one JSON object. The peak is the kernel's own high-water mark, so it covers everything from the first import on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    options = parse()
    import torch
    import transformers
    import transformers.core_model_loading
    import transformers.modeling_utils  # what loading imports, and is no part of a model
    from transformers import AutoModelForCausalLM

    import moe_offload.packed.exact
    from moe_offload import from_pretrained

    moe_offload.packed.exact.multiplier()  # numba, which the kernels of large experts need: an import, too

    marks = {"imports": status("VmRSS")}
    if options.budget is None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.checkpoint, dtype="auto", experts_implementation=options.implementation
        )
    else:
        config = {"experts_implementation": options.implementation, "compile": "graph", "reserve": options.reserve}
        model = from_pretrained(options.checkpoint, options.budget, config=config)
    marks["loaded"] = status("VmRSS")
    transformers.set_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (1, options.prompt))
    out = model.generate(prompt, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False)
    marks["generated"] = status("VmRSS")
    report = {"rss_after_imports": marks["imports"], "peak": status("VmHWM"), "rss": marks}
    report["tokens"] = out[0, options.prompt :].tolist()
    if options.budget is not None:
        stats, plan = model.moe_offload.stats(), model.moe_offload.plan
        report["stats"] = {
            name: getattr(stats, name) for name in ("hits", "misses", "streamed", "bytes_read", "graphs")
        }
        report |= {"budget": plan.budget_bytes, "expert_bytes": plan.expert_bytes, "slots": plan.slots}
        report["row_bytes"] = max(layer.row_bytes for layer in plan.layers)
        report["plan"] = dict(plan.rows())
    json.dump(report, sys.stdout)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--budget", help="none: the unmodified resident model")
    parser.add_argument("--reserve", default="auto", help="what the budget keeps free of experts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the (random, fixed) prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--implementation", default="grouped_mm")
    return parser.parse_args()


if __name__ == "__main__":
    main()
