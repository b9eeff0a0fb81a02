"""`model.moe_offload`: what a user asks of an offloaded model, in five files.

state.py      name, plan, arrangement, stats, snapshot, summary, explain
recording.py  profile: which experts were used, for the next run; trace: which experts were asked for, in order,
              and what each forward took; timeline: what happened when
remembering.py  usage that the next start begins with
watching.py   from outside the process: `moe-offload top`, Prometheus
this file     `Handle`, which is all of these: its text, its end
"""

from __future__ import annotations

from ..config.sizes import format_size
from ..observe.notebook import to_html
from .recording import Recording
from .remembering import Remembering
from .watching import Watching


class Handle(Recording, Remembering, Watching):
    """The offload state of one model: `print` it, read `stats()`, `save_profile()`, `close()`.

    Attributes:
        model: The model itself.
        tiers: Where the rows below the slots rest, for each MoE layer: "host" (RAM) or "disk".
        fingerprint: What a profile must agree with to be used for this model.
        compile: How graphs are compiled: "graph" or "inductor".
        implementation: The experts implementation whose results are reproduced, such as "grouped_mm".

    Example:

        ```python
        model = moe_offload.from_pretrained("Qwen/Qwen3-30B-A3B", budget="8GB")
        with model.moe_offload as handle:  # closed at the end
            model.generate(**inputs)
            print(handle)
        ```
    """

    def close(self) -> None:
        """Give back files, threads and memory; wait for a forward that is running. More than once is as good as once.

        From then on the model, and its `state_dict`, raise `ClosedError`. A call of the model that closes it (a hook
        may) ends first, with what the plain model gives.
        """
        self._end_watching()
        try:
            self._on_close()
        finally:
            self._end_remembering()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        """One screen: the plan, where rows rest, how graphs are compiled, what has happened."""
        tiers, graphs = ", ".join(sorted(set(self.tiers))), len(self.graphs)
        state = "closed" if self.closed else f"{self.implementation}, {self.compile}, {graphs} graphs compiled"
        locked = [f"locked in memory: {format_size(self.locked_bytes)} of slots and scratch"] * (self.locked_bytes > 0)
        read = f" (read {', '.join(how)})" if (how := self._runtime.how_read()) else ""
        rows = f"rows below the slots rest in: {tiers}{read};  {state}"
        return "\n".join([str(self.plan), *locked, rows, self.summary()])

    def __repr__(self) -> str:
        stats = self.stats()
        slots, experts = (sum(getattr(layer, n) for layer in stats.layers) for n in ("slots", "experts"))
        hits = f"hit rate {stats.hit_rate:.1%}" if stats.requests else "nothing has run yet"
        state = ", closed" if self.closed else ""
        return f"<moe_offload: {self.name}, {slots} slots for {experts} experts, {hits}{state}>"

    def _repr_html_(self) -> str:
        return to_html(self)
