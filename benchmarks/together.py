"""What several requests gain by being computed together, beside one after the other: tokens a second, in pairs.

    python benchmarks/together.py --clients 4 --residency 25% [--layers 6] [--tokens 48] [--rounds 5]

A synthetic checkpoint, each client with a prompt of its own and forced tokens, since random weights soon repeat
themselves; what is compared is what the model would have chosen. Each round runs the same requests in both ways, the
first one first in every other round. Printed: medians over rounds, and where a token's time goes. `wait` is what
compute waited for rows, `compute` the rest; `CPU` is the time of all threads, which other work beside it changes least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

import moe_offload
from moe_offload.apps.bench.result import describe_machine
from moe_offload.apps.bench.roofs.disk import disk_roof
from moe_offload.apps.bench.synthetic import make_synthetic
from moe_offload.apps.together.turn import Turn
from moe_offload.apps.together.turns import Turns
from moe_offload.config.sizes import parse_share
from moe_offload.plan.budget import budget_for
from moe_offload.plan.forecast import make_plan


class Forced(LogitsProcessor):  # type: ignore[misc]
    """The next token is that of a list; what the model would have chosen is kept."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.chosen = iter(tokens), list[int]()

    def __call__(self, ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        self.chosen.append(int(scores_BV[0].argmax()))
        forced = torch.full_like(scores_BV, -float("inf"))
        forced[0, next(self.tokens)] = 0
        return forced


class Client:
    """A request, and what the model would have chosen in it."""

    def __init__(self, model: Any, number: int, tokens: int, prompt: int, words: int):
        drawn = torch.Generator().manual_seed(number)
        vocabulary = model.config.vocab_size
        some = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[:words] if words else None

        def draw(n: int) -> torch.Tensor:
            ids = torch.randint(3, words or vocabulary, (n,), generator=drawn)
            return ids if some is None else some[ids]

        self.model, self.ids, self.forced = model, draw(prompt)[None], draw(tokens).tolist()
        self.chosen: list[int] = []

    def run(self) -> None:
        forced = Forced(self.forced)
        self.model.generate(
            self.ids, max_new_tokens=len(self.forced), do_sample=False, logits_processor=LogitsProcessorList([forced])
        )
        self.chosen = forced.chosen


def one_after_the_other(model: Any, clients: list[Client]) -> None:
    for client in clients:
        client.run()


def together(model: Any, clients: list[Client]) -> None:
    waiting = [Turn(client.run, _raise) for client in clients]
    Turns(model, len(clients)).run(lambda: waiting.pop(0) if waiting else None)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    told.add_argument("--architecture", default="qwen3-30b-a3b")
    told.add_argument("--layers", type=int, default=6)
    told.add_argument("--experts", default=None, help="mxfp4, int4 or fp8; without it bfloat16")
    told.add_argument("--residency", default="25%")
    told.add_argument("--clients", type=int, default=4)
    told.add_argument("--tokens", type=int, default=48)
    told.add_argument("--prompt", type=int, default=16)
    told.add_argument("--words", type=int, default=0, help="draw tokens from so many, the same for all; 0: from all")
    told.add_argument("--rounds", type=int, default=5)
    told.add_argument("--cache", type=Path, default=None, help="where the checkpoint is written")
    asked = told.parse_args()
    folder = make_synthetic(asked.architecture, asked.layers, asked.cache, asked.experts)
    settings = moe_offload.OffloadConfig(profile="off", kv_sequences=asked.clients, kv_tokens=512)
    plan = make_plan(folder, "1TB", config=settings)
    budget = budget_for(parse_share(asked.residency), plan.layers, plan.costs)
    model: Any = moe_offload.from_pretrained(folder, budget=budget, config=settings)
    print(describe_machine(), f"{torch.get_num_threads()} threads", sep="\n")
    print(model.moe_offload.plan)
    row_bytes = max(layer.row_bytes for layer in plan.layers)
    ways: dict[str, Callable[[Any, list[Client]], None]] = {
        "one after the other": one_after_the_other,
        "together": together,
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    equal = disk = 0.0
    for number in range(asked.rounds + 1):  # the first one compiles and warms up
        clients = [
            Client(model, 1 + number * asked.clients + i, asked.tokens, asked.prompt, asked.words)
            for i in range(asked.clients)
        ]
        chosen = []
        for way in list(ways)[:: 1 if number % 2 else -1]:
            before, begun_s, worked_s = model.moe_offload.stats(), time.perf_counter(), time.process_time()
            ways[way](model, clients)
            spent_s, worked_s = time.perf_counter() - begun_s, time.process_time() - worked_s
            after = model.moe_offload.stats()
            chosen.append([client.chosen for client in clients])
            count = asked.clients * asked.tokens
            if number:
                found[way].append(
                    {
                        "tokens/s": count / spent_s,
                        "ms a token": 1e3 * spent_s / count,
                        "CPU ms": 1e3 * worked_s / count,
                        "wait ms": 1e3 * (after.stall_s - before.stall_s) / count,
                        "MB read": (after.bytes_read - before.bytes_read) / count / 1e6,
                        "hits %": 100 * (after.hits - before.hits) / max(1, after.requests - before.requests),
                    }
                )
        equal += chosen[0] == chosen[1]
        disk = max(disk, disk_roof(model.moe_offload.files, row_bytes, 4, 0.5, number))
    print(f"{asked.clients} clients, {asked.tokens} tokens each after {asked.prompt}; medians of {asked.rounds} rounds")
    print(f"{'':<22}" + "".join(f"{name:>12}" for name in [*found["together"][0], "compute ms", "disk ms"]))
    medians = {
        way: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for way, rounds in found.items()
    }
    for way, row in medians.items():
        row |= {"compute ms": row["ms a token"] - row["wait ms"], "disk ms": row["MB read"] * 1e9 / disk}
        print(f"{way:<22}" + "".join(f"{value:>12.2f}" for value in row.values()))
    pairs = [b["tokens/s"] / a["tokens/s"] for a, b in zip(*found.values(), strict=True)]
    print(f"disk {disk / 1e9:.2f} GB/s; all choices equal in {equal:.0f} of {asked.rounds + 1} rounds")
    print(f"together / one after the other: {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})")


if __name__ == "__main__":
    main()
