"""What the host does around one decode step that is replayed as a CUDA graph: all but the launch itself, on a CPU that
stands in for the GPU. The step is compiled and recorded as on a GPU, and its recording is an empty function.
Seconds of this process on a processor, so that a busy machine does not count.

    python benchmarks/host_step.py --layers 48 --repeats 300
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from transformers import StaticCache

import moe_offload
from moe_offload import OffloadConfig
from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts
from moe_offload.forward.graphs import compiling
from moe_offload.forward.out_of_memory.retry import Retry
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs


class Timed:
    """Seconds on a processor within a function, in all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - begun

        return timed


class Recording:
    """Runs a graph as it is until `replayed` is set, and then only gives back what it gave last."""

    replayed = False

    def compile(self, gm: Any, inputs: list[Any], **_: Any) -> Any:
        forward, last = gm.forward, []

        def run(*args: Any) -> Any:
            if not self.replayed:
                last[:] = forward(*args)
            return tuple(last)

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--family", default="qwen3_moe", help="a model type with a static KV cache")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="print what takes the time, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recording = Recording()
    with ExitStack() as on_gpu:
        on_gpu.enter_context(mock.patch.object(compiling, "run_inductor", recording.compile))
        on_gpu.enter_context(mock.patch.object(compiling, "is_on_gpu", lambda bank_SN: True))
        on_gpu.enter_context(mock.patch.object(Retry, "_runs_out", lambda self: True))
        compiled, launched, find = Timed(), Timed(), Retry._find
        on_gpu.enter_context(mock.patch.object(compiling, "launch", launched.around(compiling.launch)))
        on_gpu.enter_context(mock.patch.object(Retry, "_find", lambda self, *args: compiled.around(find(self, *args))))
        model, cache = make(options.family, options.layers)
        with torch.no_grad():
            model(torch.arange(3, 15).view(1, -1), past_key_values=cache)
            step = as_generate_does(model, cache)
            for _ in range(4):
                model(**step)
            recording.replayed, compiled.seconds, launched.seconds = True, 0.0, 0.0
            times = []
            for _ in range(options.repeats):
                begun = time.process_time()
                model(**step)
                times.append(time.process_time() - begun)
            dynamo_us, launch_us = (
                1e6 * x / options.repeats for x in (compiled.seconds - launched.seconds, launched.seconds)
            )
            if options.profile:
                import cProfile
                import pstats

                with cProfile.Profile() as profile:
                    for _ in range(options.repeats):
                        model(**step)
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        low, median, high = statistics.quantiles(times, n=4)
        print(f"of which Dynamo {dynamo_us:.0f} us, mostly its guards; the launch {launch_us:.0f} us")
        quartiles = f"{1e6 * low:.0f} to {1e6 * high:.0f}"
        print(f"{options.family}, {options.layers} layers: {1e6 * median:.0f} us a step (quartiles {quartiles})")


def make(family: str, layers: int) -> tuple[Any, StaticCache]:
    model = build(family, num_hidden_layers=layers)
    moe_layers = find_experts(model)
    settings = OffloadConfig(
        experts_implementation="grouped_mm",
        compile="inductor",
        kv_tokens=64,
        wave_rows=1,
        decide="device",
        profile="off",
    )
    settings = replace(settings, dynamic=None)
    budget = budget_for(0.5, layer_shapes(moe_layers), sum_costs(model, moe_layers, settings))
    model = moe_offload.optimize(model, budget, device_map="cpu", config=settings)
    return model, StaticCache(config=model.config, max_cache_len=64)


def as_generate_does(model: Any, cache: StaticCache) -> dict[str, Any]:
    """What a decode step of `generate` is called with: masks, too."""
    given: dict[str, Any] = model.prepare_inputs_for_generation(
        torch.tensor([[5]]),
        past_key_values=cache,
        attention_mask=torch.ones(1, 13, dtype=torch.long),
        position_ids=torch.tensor([[12]]),
        use_cache=True,
        next_sequence_length=1,
    )
    return given


if __name__ == "__main__":
    main()
