"""What serving experts from a bank costs when every one of them is resident: time per layer and token.

    python benchmarks/overhead.py                                a model with random weights
    python benchmarks/overhead.py --checkpoint PATH              and a real one
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --json out.json

Both sides run in one process: the unmodified model, compiled (the graph as it is, or through Inductor), and the same
model offloaded with a budget that holds all experts, compiled the same way. Both decode the same given tokens, from the
same prompt, with a DynamicCache each. They take turns step by step, and who goes first alternates with every step, so
that a busy machine slows both. A repeat's overhead is the median difference over its pairs of steps; reported is the
median over repeats, and their quartiles, which say how quiet the machine was. Compilation, prefill and the first tokens
are not counted. On a busy machine use one thread and --clock cpu, which does not run while other processes do.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_offload
from moe_offload.experts import find_experts
from moe_offload.runtime.prewarm import prewarm_slots

PROMPT = 16


@dataclass
class Row:
    """One comparison. Times are microseconds per layer and token, except where the name says otherwise."""

    model: str
    dtype: str
    implementation: str
    compile: str
    layers: int
    reference_ms_per_token: float
    offloaded_ms_per_token: float
    overhead_us: float
    overhead_us_quartiles: tuple[float, float]
    overhead_percent: float
    max_logit_difference: float


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore")
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.clock} clock, load average {load:.1f}"
    )
    print(f"{'model':<16}{'dtype':<10}{'experts':<12}{'compile':<10}{'resident':>12}{'offloaded':>12}{'overhead':>32}")
    rows = []
    for source, implementation, inner in itertools.product(sources(options), options.implementation, options.compile):
        row = compare(*source, implementation, inner, options)
        rows.append(row)
        low, high = row.overhead_us_quartiles
        cost = f"{row.overhead_us:.1f} us ({low:.1f} to {high:.1f}) {row.overhead_percent:+.1f} %"
        print(
            f"{row.model:<16}{row.dtype:<10}{row.implementation:<12}{row.compile:<10}"
            f"{row.reference_ms_per_token:>9.2f} ms{row.offloaded_ms_per_token:>9.2f} ms{cost:>32}",
            flush=True,
        )
    print("resident, offloaded: a token; overhead: a layer and token, median of paired differences (quartiles)")
    if options.json:
        machine = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "clock": options.clock,
            "load_average": os.getloadavg(),
            "argv": sys.argv[1:],
        }
        options.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1))


def sources(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Model and dtype of each comparison; a checkpoint keeps its own dtype."""
    found = [] if options.skip_random else [("random", dtype) for dtype in options.dtype]
    return found + [(str(path), "auto") for path in options.checkpoint]


def compare(source: str, dtype: str, implementation: str, inner: str, options: argparse.Namespace) -> Row:
    torch._dynamo.reset()
    gc.collect()
    resident = build(source, dtype, options)
    offloaded = copy.deepcopy(resident)
    resident.set_experts_implementation(implementation)
    resident.compile(backend="inductor" if inner == "inductor" else "eager", dynamic=True)
    settings = {"experts_implementation": implementation, "compile": inner, "reserve": 0, "profile": "off"}
    moe_offload.optimize(offloaded, "100GB", device_map="cpu", config=settings)
    handle = offloaded.moe_offload
    layers = len(handle.moe_layers)
    if handle.plan.residency != 1.0:
        raise SystemExit("not all experts are resident")
    prewarm_slots(handle._runtime, [(moe.index, e) for moe in handle.moe_layers for e in range(moe.num_experts)])

    torch.manual_seed(0)
    prompt = torch.randint(3, resident.config.vocab_size, (1, PROMPT))
    ids = torch.randint(3, resident.config.vocab_size, (options.steps,))
    sides = [Side(resident, prompt, ids), Side(offloaded, prompt, ids)]
    for _ in range(options.warm_up):
        for side in sides:
            side.rewind()
            for i in range(options.steps):
                side.step(i)
    graphs = handle.stats().graphs
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds = [one_repeat(sides, options.steps, clock) for _ in range(options.repeats)]
    stats = handle.stats()
    if stats.graphs != graphs or stats.misses:
        raise SystemExit(f"recompiled or missed while being timed: {stats}")
    difference = float((sides[0].logits - sides[1].logits).abs().max())
    handle.close()

    per_layer = [statistics.median(paired(steps)) / layers * 1e6 for steps in seconds]
    a, b = (statistics.median(step[i] for steps in seconds for step in steps) * 1e3 for i in (0, 1))
    low, _, high = statistics.quantiles(per_layer, n=4)
    overhead = statistics.median(per_layer)
    return Row(
        Path(source).name,
        str(resident.dtype).removeprefix("torch."),
        implementation,
        inner,
        layers,
        a,
        b,
        overhead,
        (low, high),
        overhead * layers / 1e3 / a * 100,
        difference,
    )


def one_repeat(sides: list[Side], steps: int, clock: Callable[[], float]) -> list[tuple[float, float]]:
    """Seconds of each step on each side, the two taking turns."""
    seconds = []
    for side in sides:
        side.rewind()
    for i in range(steps):
        pair = [0.0, 0.0]
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            begun = clock()
            sides[which].step(i)
            pair[which] = clock() - begun
        seconds.append((pair[0], pair[1]))
    return seconds


def paired(seconds: list[tuple[float, float]]) -> list[float]:
    """Differences over two neighbouring steps, one in each order: going second costs something of its own."""
    differences = [b - a for a, b in seconds]
    return [(x + y) / 2 for x, y in zip(differences[::2], differences[1::2], strict=True)]


class Side:
    """One of the two models, and the cache it decodes into."""

    def __init__(self, model: Any, prompt: torch.Tensor, ids: torch.Tensor):
        self.model, self.prompted = model, DynamicCache(config=model.config)
        self.ids = [step.view(1, 1) for step in ids]
        with torch.no_grad():
            model(prompt, past_key_values=self.prompted, use_cache=True)

    def rewind(self) -> None:
        self.cache = copy.deepcopy(self.prompted)

    def step(self, i: int) -> None:
        """Tokens are given, not sampled: both sides do the same work whatever they answer."""
        with torch.no_grad():
            self.logits = self.model(self.ids[i], past_key_values=self.cache, use_cache=True).logits


def build(source: str, dtype: str, options: argparse.Namespace) -> Any:
    if source != "random":
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        moe_intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        max_position_embeddings=2048,
    )
    model = Qwen3MoeForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    if len(find_experts(model)) != options.layers:
        raise SystemExit("expected every layer to have experts")
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="measure this model too")
    parser.add_argument("--skip-random", action="store_true", help="only the checkpoints")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--implementation", nargs="+", default=["grouped_mm", "batched_mm"])
    parser.add_argument("--compile", nargs="+", default=["graph", "inductor"])
    parser.add_argument("--steps", type=int, default=64, help="decode steps in a repeat")
    parser.add_argument("--repeats", type=int, default=9, help="paired repeats; at least 5")
    parser.add_argument("--warm-up", type=int, default=1, help="uncounted repeats; the first steps compile")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    if options.steps % 2:
        parser.error("--steps: an even number, half of them in each order")
    if options.repeats < 5:
        parser.error("--repeats: at least 5, or the median says nothing")
    return options


if __name__ == "__main__":
    main()
