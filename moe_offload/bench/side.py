"""One side of the comparison in its own process: commands come in as JSON lines, answers go out as JSON lines.

python -m moe_offload.bench.side '{"side": "ours", "folder": ..., "budget": ..., "scratch": ..., "routing": ...,
                                   "tokens": 545, "device": "cpu"}'
<- {"ready": ..., "baseline_bytes": ...}                       nothing loaded yet: now a limit may be put around it
-> {"do": "load"}                                              <- {"load_s": ..., "plan": {...}}
-> {"do": "ask", "prompt": [...], "new_tokens": 32, "row": 0}  <- an Answer, with counters and the ids it used
-> {"do": "read", "seconds": 1.0, "seed": 1}                   <- {"bandwidth": ...}    ours: rows, nothing computed
-> {"do": "link", "row_bytes": ...}                            <- {"copy_engine": ..., "kernel": ..., "free_bytes": ...}
-> {"do": "memory"}                                            <- {"peak_bytes": ...}
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..experts import find_experts
from ..loading import skeleton
from .contenders_cuda import SIDES_ON, STATIC
from .limit import METERS
from .link import free_bytes, link_rates
from .request import ask
from .routing import Routing, install, load_recorded

COUNTERS = ("hits", "misses", "bytes_read", "stall_s")
#: Decoded tokens of a request that do not count, at most half: generate() makes a KV cache for each request, and a CUDA
#: graph whose addresses have changed is recorded anew, which takes longer than many tokens.
LEFT_OUT = {"cpu": 0, "cuda": 8}


class Side:
    """The loaded model, its routing, and what may be asked of it."""

    def __init__(
        self, side: str, folder: str, budget: int, scratch: str, routing: str | None, tokens: int, device: str
    ):
        self.name, self.folder, self.budget = side, Path(folder), budget
        self.tokens, self.device = tokens, device
        self.scratch, self.routing_file = Path(scratch), routing
        self.model: Any = None

    def load(self) -> dict[str, Any]:
        METERS[self.device].reset()
        begun = time.perf_counter()
        self.model = SIDES_ON[self.device][self.name](self.folder, self.budget, self.scratch)
        load_s = time.perf_counter() - begun
        banks = find_experts(skeleton(self.folder))
        first = banks[0]
        recorded = None
        if self.routing_file is not None:
            recorded = load_recorded(self.routing_file, len(banks), first.num_experts, first.top_k)
        self.routing = Routing(recorded, [bank.top_k for bank in banks], self.tokens, self.device)
        install(self.model, [bank.name for bank in banks], self.routing)
        note = recorded.note if recorded else None
        plan = self._handle.plan if self._handle else None
        return {"load_s": load_s, "routing": note, "slots": list(plan.slots) if plan else None}

    def ask(self, prompt: list[int], new_tokens: int, row: int) -> dict[str, Any]:
        self.routing.seek(row, len(prompt) + new_tokens)
        options = STATIC if self.device != "cpu" and self.name != "accelerate" else {}
        left_out = min(LEFT_OUT[self.device], new_tokens // 2)
        answer = ask(self.model, prompt, new_tokens, self._counters, self.device, left_out, **options)
        used = self.routing.used(len(prompt), new_tokens) if self._handle else None
        return {**dataclasses.asdict(answer), "used": used}

    def read(self, seconds: float, seed: int) -> dict[str, Any]:
        """Rows from the store as the engine reads them, into the scratch rows, and nothing else.

        Others every time: what was read a moment ago may lie in a cache of the disk or the host.
        """
        runtime = self._handle._runtime
        moved, turn, choose = 0, 0, random.Random(seed)
        under_way: list[Any] = []
        begun = time.perf_counter()
        while (now := time.perf_counter()) - begun < seconds or under_way:
            layer = choose.choice(runtime.layers)
            places = layer.arrivals.scratch.rows
            if now - begun < seconds and len(under_way) < len(places):
                expert = choose.randrange(layer.bank.num_experts)
                row = places[turn % len(places)]
                under_way.append(layer.arrivals.transfer.start(layer.store, layer.bank.index, expert, row))
                turn += 1
            else:
                moved += layer.arrivals.transfer.wait(under_way.pop(0))
        return {"bandwidth": moved / (time.perf_counter() - begun)}

    def link(self, row_bytes: int) -> dict[str, float]:
        """What this process, with nothing loaded, gets from the link to the device, in bytes/s."""
        return {"free_bytes": free_bytes(), **link_rates(row_bytes, self.device)}

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": METERS[self.device].peak()}

    @property
    def _handle(self) -> Any:
        return getattr(self.model, "moe_offload", None)

    def _counters(self) -> dict[str, float]:
        if not self._handle:
            return {}
        stats = self._handle.stats()
        return {name: getattr(stats, name) for name in COUNTERS}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401  what any side imports is no memory of it

    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # nor is what tracing imports
    side = Side(**json.loads(sys.argv[1]))

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"ready": True, "baseline_bytes": METERS[side.device].held()})
    with torch.inference_mode(False), torch.no_grad():
        for line in sys.stdin:
            command = json.loads(line)
            try:
                say(getattr(side, command.pop("do"))(**command))
            except Exception as error:  # the driver decides what a side that fails means
                say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
