"""One side of the comparison in its own process: commands come in as JSON lines, answers go out as JSON lines.

python -m moe_offload.apps.bench.sides.side '{"side": "ours", "device": "cpu", "folder": ..., ...}' LIFELINE
<- {"ready": ..., "baseline_bytes": ...}                       nothing loaded yet: now a limit may be put around it
-> {"do": "load"}                                              <- {"load_s": ..., "slots": [...]}
-> {"do": "ask", "prompt": [...], "new_tokens": 32, "row": 0, "forced": [...]}
                                                               <- an Answer, with counters and the ids it used
-> {"do": "read", "seconds": 1.0, "seed": 1}                   <- {"bandwidth": ...}    ours: rows, nothing computed
-> {"do": "memory"}                                            <- {"peak_bytes": ...}
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ....cache.counters import Stats
from ....checkpoint.outline import outline_folder
from ....experts import MoELayer
from ..devices import DEVICES
from ..llama.side import LlamaSide
from ..request import ask_model, counted_read
from ..routing import Routing, install_routing, is_replayable, load_recorded
from .contenders import CPU_SIDES, Contender, Job
from .gpu_contenders import GPU_SIDES
from .lifeline import end_with
from .names import LLAMA

SIDES: dict[str, dict[str, Contender]] = {"cpu": CPU_SIDES, "cuda": GPU_SIDES}


class Side:
    """The loaded model, its routing, and what may be asked of it: requests of at most `tokens` tokens."""

    def __init__(
        self,
        side: str,
        device: str,
        folder: str,
        budget: int,
        scratch: str,
        routing: str | None,
        tokens: int,
        trust_remote_code: bool = False,
    ):
        self.contender, self.device = SIDES[device][side], DEVICES[device]()
        self.job = Job(Path(folder), budget, Path(scratch), tokens, trust_remote_code)
        self.routing: Routing | None = None
        self.routing_file = routing
        self.model: Any = None
        self._peaks: list[int | None] = []

    def load(self) -> dict[str, Any]:
        self.device.reset_peak()
        begun = time.perf_counter()
        self.model = self.contender.load(self.job)
        self.device.settle()
        load_s = time.perf_counter() - begun
        moe_layers = outline_folder(self.job.folder, self.job.arguments).moe_layers
        note = self._route(moe_layers) if is_replayable(moe_layers) else None
        plan = self._handle.plan if self._handle else None
        return {"load_s": load_s, "routing": note, "slots": list(plan.slots) if plan else None}

    def _route(self, moe_layers: Sequence[MoELayer]) -> str | None:
        """Replay the trace that was asked for, if any, and note which experts are used. Returns how it is replayed."""
        first, recorded = moe_layers[0], None
        if self.routing_file is not None:
            recorded = load_recorded(self.routing_file, len(moe_layers), first.num_experts, first.top_k)
        top_ks = [moe.top_k for moe in moe_layers]
        self.routing = routing = Routing(recorded, top_ks, self.job.tokens, self.device.name)
        install_routing(self.model, [moe.name for moe in moe_layers], routing)
        return recorded.note if recorded else None

    def ask(
        self, prompt: list[int], new_tokens: int, row: int, left_out: int = 0, forced: list[int] | None = None
    ) -> dict[str, Any]:
        if self.routing is not None:
            self.routing.seek(row, len(prompt) + new_tokens)
        self._peaks = []
        answer = ask_model(
            self.model,
            prompt,
            new_tokens,
            self._mark,
            device=self.device.name,
            settle=self.device.settle,
            left_out=left_out,
            forced=forced,
            **self.contender.options,
        )
        used = self.routing.used(len(prompt), new_tokens) if self._handle and self.routing is not None else None
        return {**dataclasses.asdict(answer), "used": used, "peaks_bytes": self._peaks[1:]}

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
            places = layer.arrivals.scratch_rows.rows
            if now - begun < seconds and len(under_way) < len(places):
                expert = choose.randrange(layer.moe.num_experts)
                row = places[turn % len(places)]
                under_way.append(layer.arrivals.transfer.start(layer.store, layer.moe.index, expert, row))
                turn += 1
            else:
                moved += layer.arrivals.transfer.wait(under_way.pop(0))
        return {"bandwidth": moved / (time.perf_counter() - begun)}

    def memory(self) -> dict[str, Any]:
        return self.device.memory()

    @property
    def _handle(self) -> Any:
        return getattr(self.model, "moe_offload", None)

    def _mark(self) -> dict[str, float]:
        """Where a phase ends: what has been counted so far, and the memory that the phase took."""
        self._peaks.append(self.device.take_peak())
        counted = counted_read()
        if self._handle:
            stats: Stats = self._handle.stats()
            counted |= dict(stats.values())
        return counted


def main() -> None:
    end_with(int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401  what any side imports is no memory of it

    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # nor is what tracing imports
    given = json.loads(sys.argv[1])
    side = LlamaSide(**given) if given["side"] == LLAMA else Side(**given)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"ready": True, "baseline_bytes": side.device.held_bytes()})
    with torch.inference_mode(False), torch.no_grad():
        for line in sys.stdin:
            command = json.loads(line)
            try:
                say(getattr(side, command.pop("do"))(**command))
            except Exception as error:  # the driver decides what a side that fails means
                say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
