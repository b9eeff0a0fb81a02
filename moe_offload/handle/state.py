"""What an offloaded model is and has done: its name, plan and counters, read at any time from any thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from ..cache.counters import Counters, LayerStats, Stats
from ..experts import MoELayer
from ..observe.live.snapshot import Snapshot
from ..observe.profile import Fingerprint
from ..observe.summary import summary_of
from ..observe.timeline import Depth
from ..plan.arrange import Arrangement
from ..plan.budget import Plan
from ..plan.explain import explain_arrangement
from ..plan.prefill import PrefillRoom
from ..plan.prepare import name_of
from ..ranks.group import Group
from ..ranks.merge import gather_counters
from ..runtime.model import Runtime


class State:
    """The facts about one offloaded model that do not depend on anything being recorded or served."""

    def __init__(
        self,
        model: Any,
        runtime: Runtime,
        arrangement: Arrangement,
        fingerprint: Fingerprint,
        *,
        compile: str,
        implementation: str,
        graphs: list[Any],
        room: PrefillRoom,
        ranks: Group | None = None,
        on_close: Callable[[], None],
    ):
        self._arranged, self.tiers, self.fingerprint = arrangement, arrangement.tiers, fingerprint
        self.compile, self.implementation, self.graphs = compile, implementation, graphs
        self.model, self._runtime, self._on_close = model, runtime, on_close
        self.ranks, self._room = ranks, room
        self._begun_s = time.monotonic()

    @property
    def name(self) -> str:
        """What the model calls itself: the name of its repository or of its folder, or else its class."""
        return name_of(self.model)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers of the model, in the order in which a forward comes to them."""
        return [layer.moe for layer in self._runtime.layers]

    @property
    def arrangement(self) -> Arrangement:
        """Where everything is now. Slots may have been given back since the model was optimised, for want of memory."""
        return self._arranged.with_slots(self._runtime.slots)

    @property
    def plan(self) -> Plan:
        """What the budget is spent on now: bytes of each part, slots of each layer.

        Raises:
            ConfigError: The model is spread over several devices, each with a plan of its own.
        """
        return self.arrangement.plan

    @property
    def locked_bytes(self) -> int:
        """How much of slots and scratch is locked in main memory (`lock_memory`)."""
        return self._runtime.layers[0].locked.nbytes

    @property
    def files(self) -> list[Path]:
        """The files that experts are read from; none where their rows rest in main memory."""
        stores = {id(layer.store): layer.store for layer in self._runtime.layers}
        return sorted({file for store in stores.values() for file in getattr(store, "files", ())})

    @property
    def closed(self) -> bool:
        """Whether files and memory were given back."""
        return self._runtime.closed

    def prefill_chunk_size(self, tokens: int, past: int = 0, sequences: int = 1) -> int:
        """How many tokens of a prompt `generate` reads at a time: as many as the reserve has room for.

        Plain transformers, told the same by its argument of this name, gives the same logits to the bit.

        Args:
            tokens: How many the prompt has.
            past: How many are in the KV cache before it.
            sequences: How many prompts of this length there are, beams included.

        Returns:
            Tokens of each sequence; all of them where the prompt is read at once.

        Example:

            ```python
            size = model.moe_offload.prefill_chunk_size(8192)
            ```
        """
        return self._room.piece_tokens(tokens, past, sequences)

    def stats(self) -> Stats:
        """Counters as of now, over all layers and layer by layer. Any thread may ask; no forward is waited for.

        Returns:
            `Stats`: totals since the model was optimised. Times are in seconds, sizes in bytes; `layers` has one
            `LayerStats` for each MoE layer. The difference of two is what happened in between.

        Example:

            ```python
            before = model.moe_offload.stats()
            model.generate(**inputs)
            print((model.moe_offload.stats() - before).hit_rate)
            ```
        """
        layers = [
            LayerStats(
                **layer.counters.snapshot().values(),
                name=layer.moe.name,
                experts=layer.moe.num_experts,
                slots=layer.cache.slots,
                resident=layer.resident,
                row_bytes=layer.moe.layout.row_bytes,
                decides="device" if layer.moe.index in self._runtime.device_layers else "host",
            )
            for layer in self._runtime.layers
        ]
        return Stats(**Counters.total(layers).values(), graphs=len(self.graphs), layers=layers)

    def stats_of_ranks(self) -> list[Counters]:
        """The totals of every rank that shares the model's experts. Every rank calls it, and gets the same.

        Returns:
            `Counters` by rank; of a model in one process a list of one. `Counters.total` of it sums up what was
            read, and counts each token once.

        Raises:
            RankError: Another rank does not call it, or has ended.

        Example:

            ```python
            reads = [one.bytes_read for one in model.moe_offload.stats_of_ranks()]
            ```
        """
        own = self.stats()
        return [own] if self.ranks is None else gather_counters(self.ranks, own)

    def depth(self) -> Depth:
        """How much is being read at this moment.

        Returns:
            `Depth`: rows in either queue, threads that read, bytes of all rows queued or being read.
        """
        return self._runtime.depth()

    def snapshot(self) -> dict[str, Any]:
        """State and counters as of now, as plain JSON values. Any thread may ask; no forward is waited for.

        Returns:
            `{name: value}`: all of `stats()`, and of the process its memory (bytes), uptime (seconds) and queues.

        Example:

            ```python
            print(json.dumps(model.moe_offload.snapshot(), indent=1))
            ```
        """
        return asdict(self._snapshot())

    def summary(self) -> str:
        """What has happened so far, in a line or two: tokens, hits, bytes; what was read ahead, if anything was.

        Returns:
            Text without a line break at its end.
        """
        return summary_of(self.stats())

    def explain(self) -> str:
        """Which rule put what where, and what was not offloaded and why.

        Returns:
            Text, a line for each part of the model.
        """
        return explain_arrangement(self.model, self.moe_layers, self.arrangement)

    def _snapshot(self) -> Snapshot:
        stats, depth = self.stats(), self.depth()
        return Snapshot(
            **stats.values(),
            graphs=stats.graphs,
            layers=stats.layers,
            model=self.name,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._begun_s,
            budget_bytes=self.plan.budget_bytes,
            plan=self.plan.parts(),
            rss_bytes=psutil.Process().memory_info().rss,
            queued=depth.demanded + depth.background,
            reading=depth.reading,
        )
