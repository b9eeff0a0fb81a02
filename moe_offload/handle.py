"""`model.moe_offload`: what a user asks of an offloaded model.

    state      plan, arrangement, stats, snapshot, summary, explain
    profile    which experts were used, for the next run
    trace      which experts were asked for, in order, and what each forward took; the timeline
    watch      from outside: `moe-offload top`, Prometheus
    end        close

Longer than 250 lines for its docstrings: this is the page that users read.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from .cache.counters import Counters, LayerStats, Stats
from .errors import TraceError
from .experts import MoELayer
from .observe import chrome_trace
from .observe.live.server import LiveView, open_view
from .observe.live.snapshot import Snapshot
from .observe.metrics import LOCAL, Exporter, registry_of
from .observe.notebook import to_html
from .observe.profile import Fingerprint, Profile
from .observe.summary import summary_of
from .observe.timeline import Depth, Timeline
from .observe.trace import Trace
from .observe.trace_recorder import ForwardRecord, TraceRecorder
from .plan.arrange import Arrangement
from .plan.budget import Plan
from .plan.explain import explain
from .runtime.model import Runtime


class Handle:
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
        on_close: Callable[[], None],
    ):
        self._arranged, self.tiers, self.fingerprint = arrangement, arrangement.tiers, fingerprint
        self.compile, self.implementation, self.graphs = compile, implementation, graphs
        self.model, self._runtime, self._on_close = model, runtime, on_close
        self._begun_s = time.monotonic()
        self._recorder: TraceRecorder | None = None
        self._timeline: Timeline | None = None
        self._live: LiveView | None = None
        self._exporters: list[Exporter] = []

    # State: what there is, and what it has done.

    @property
    def name(self) -> str:
        """What the model calls itself: the name of its repository or of its folder, or else its class."""
        name = str(getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__)
        name = Path(name).resolve().name if Path(name).is_absolute() or Path(name).exists() else name
        return "".join(c for c in name if c.isprintable())[:200] or type(self.model).__name__

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
    def closed(self) -> bool:
        """Whether files and memory were given back."""
        return self._runtime.closed

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
        return explain(self.model, self.moe_layers, self.arrangement)

    # Profile: which experts a workload uses.

    def profile(self, **meta: str) -> Profile:
        """The activation profile so far: how often each layer used each expert, since the model was optimised.

        Args:
            meta: Free text about the workload, kept in the profile.

        Returns:
            `Profile`: `counts[layer][expert]`, every token-expert pair counted.

        Example:

            ```python
            profile = model.moe_offload.profile(language="it")
            ```
        """
        counters = [layer.counters.snapshot() for layer in self._runtime.layers]
        return Profile.of_layers(self.fingerprint, counters, meta)

    def save_profile(self, path: str | Path, **meta: str) -> Path:
        """Write the profile so far to a file, whole or not at all. Load it with `optimize(..., profile=path)`.

        Args:
            path: The JSON file to write. One that is there is replaced.
            meta: Free text about the workload, kept in the profile.

        Returns:
            `path`.

        Raises:
            ProfileError: The file cannot be written. What was there before is unchanged.

        Example:

            ```python
            model.moe_offload.save_profile("italian.json", language="it")
            ```
        """
        return self.profile(**meta).save(path)

    # Trace and timeline: what happened, in order.

    def start_trace(self) -> None:
        """Write down from now on which experts are asked for, forward by forward: 64 MB of ids at most.

        Raises:
            TraceError: The device decides what is in the slots, and the host does not hear of it.
            ClosedError: The model was closed.

        Example:

            ```python
            model.moe_offload.start_trace()
            model.generate(**inputs)
            model.moe_offload.save_trace("run.npz")  # moe-offload simulate run.npz
            ```
        """
        if self._runtime.device_caches is not None:
            raise TraceError(
                "the device decides which experts are in the slots, and the host does not hear their ids; to record a "
                "trace, load the model with config={'decide': 'host'}"
            )
        layers = self._runtime.layers
        self._recorder = TraceRecorder([layer.cache for layer in layers], [layer.moe.top_k for layer in layers])
        self._runtime.record_trace(self._recorder)

    def trace(self, **meta: str) -> Trace:
        """What `start_trace` has recorded, for `simulate`. Started before the first token, without a profile,
        look-ahead and failed reads, it replays to the very hits, misses and bytes of `stats()`.

        Args:
            meta: Free text, kept in the trace besides the model type, the bytes of a row and the slots.

        Returns:
            `Trace`: ids `[T, L, K]` of the tokens, layers and choices so far.

        Raises:
            TraceError: `start_trace` was not called, or nothing has run since.

        Example:

            ```python
            model.moe_offload.start_trace()
            model.generate(**inputs)
            print(model.moe_offload.trace(language="it").experts_TLK.shape)
            ```
        """
        facts = {
            "model_type": self.fingerprint.model_type,
            "row_bytes": str(max(moe.layout.row_bytes for moe in self.moe_layers)),
            "slots": ",".join(map(str, self.plan.slots)),
        }
        with self._runtime.lock:
            return self._recording().trace({**facts, **meta})

    def save_trace(self, path: str | Path, **meta: str) -> Path:
        """Write the trace to a file, whole or not at all.

        Args:
            path: The .npz file to write. One that is there is replaced.
            meta: Free text, kept in the trace.

        Returns:
            `path`.

        Raises:
            TraceError: There is no trace, or the file cannot be written.

        Example:

            ```python
            model.moe_offload.save_trace("run.npz", prompt="italian")
            ```
        """
        return self.trace(**meta).save(path)

    def forwards(self) -> list[ForwardRecord]:
        """What every forward since `start_trace` took.

        Returns:
            One `ForwardRecord` each: its counters, when it began and ended, and how long it compiled (seconds).

        Raises:
            TraceError: `start_trace` was not called.
        """
        with self._runtime.lock:
            return self._recording().forwards()

    def recorded_s(self) -> float:
        """How long the trace is.

        Returns:
            Seconds from `start_trace` to now, or to where the trace was full.

        Raises:
            TraceError: `start_trace` was not called.
        """
        return self._recording().passed_s()

    def start_timeline(self) -> None:
        """Write down from now on what happens when: forwards, waits, reads, queues. 200,000 events at most.

        Raises:
            ClosedError: The model was closed.

        Example:

            ```python
            model.moe_offload.start_timeline()
            model.generate(**inputs)
            model.moe_offload.save_timeline("run.json.gz")  # ui.perfetto.dev opens it
            ```
        """
        timeline = Timeline([layer.cache for layer in self._runtime.layers])
        self._runtime.record_timeline(timeline)
        self._timeline = timeline

    def save_timeline(self, path: str | Path, torch_profile: str | Path | None = None) -> Path:
        """Write what `start_timeline` has recorded to a file, whole or not at all: a Chrome trace.

        Args:
            path: The .json or .json.gz file to write. One that is there is replaced.
            torch_profile: What `export_chrome_trace` of a `torch.profiler` has written about the same forwards: `path`
                then holds both, on one clock.

        Returns:
            `path`.

        Raises:
            TraceError: `start_timeline` was not called, nothing has run since, or a file cannot be read or written.

        Example:

            ```python
            model.moe_offload.save_timeline("run.json")  # for ui.perfetto.dev
            ```
        """
        if self._timeline is None:
            raise TraceError("no timeline is being recorded: call model.moe_offload.start_timeline() before the run")
        return chrome_trace.save(self._timeline, path, torch_profile)

    # Watch: from outside the process.

    def serve_live(self) -> Path | None:
        """Let `moe-offload top` watch this model, until it is closed. It costs nothing while nobody looks.

        Returns:
            The path of the socket; None where there can be none. That is logged, and the model runs on.

        Raises:
            ClosedError: The model was closed.

        Example:

            ```python
            model.moe_offload.serve_live()  # and in another terminal: moe-offload top
            ```
        """
        self._runtime.check_open()
        if self._live is None:
            this = weakref.ref(self)  # the view must not keep a model alive that nobody else needs
            self._live = open_view(lambda: _line(this()))
            if self._live is not None:
                weakref.finalize(self, self._live.close)
        return None if self._live is None else self._live.path

    def metrics(self, per_layer: bool = False) -> Any:
        """The counters as Prometheus metrics, read when they are scraped.

        Args:
            per_layer: Whether each layer has samples of its own, with a label `layer`.

        Returns:
            A `prometheus_client.CollectorRegistry` of this model alone.

        Raises:
            OffloadError: prometheus_client is missing (the extra `metrics`).

        Example:

            ```python
            app.mount("/metrics", prometheus_client.make_asgi_app(model.moe_offload.metrics()))
            ```
        """
        return registry_of(self, per_layer)

    def serve_metrics(self, port: int, addr: str = LOCAL, per_layer: bool = False) -> str:
        """Serve `metrics()` over HTTP, from a thread of its own, until the model is closed.

        Args:
            port: 1 to 65535, or 0 for one that is free.
            addr: The address to listen on; 127.0.0.1 by default, which only this machine reaches.
            per_layer: As in `metrics`.

        Returns:
            The URL.

        Raises:
            ConfigError: The port cannot be had.
            OffloadError: prometheus_client is missing (the extra `metrics`).
            ClosedError: The model was closed.

        Example:

            ```python
            print(model.moe_offload.serve_metrics(9100))
            ```
        """
        self._runtime.check_open()
        exporter = Exporter(self.metrics(per_layer), port, addr)
        self._exporters.append(exporter)
        weakref.finalize(self, exporter.close).atexit = False  # its thread ends with the process
        return exporter.url

    # The end.

    def close(self) -> None:
        """Give back files, threads and memory; wait for a forward that is running. More than once is as good as once.

        From then on the model, and its `state_dict`, raise `ClosedError`.
        """
        if self._live is not None:
            self._live.close()
        while self._exporters:
            self._exporters.pop().close()
        self._on_close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        """One screen: the plan, where rows rest, how graphs are compiled, what has happened."""
        tiers, graphs = ", ".join(sorted(set(self.tiers))), len(self.graphs)
        state = "closed" if self.closed else f"{self.implementation}, {self.compile}, {graphs} graphs compiled"
        return "\n".join([str(self.plan), f"rows below the slots rest in: {tiers};  {state}", self.summary()])

    def __repr__(self) -> str:
        stats = self.stats()
        slots, experts = (sum(getattr(layer, n) for layer in stats.layers) for n in ("slots", "experts"))
        hits = f"hit rate {stats.hit_rate:.1%}" if stats.requests else "nothing has run yet"
        state = ", closed" if self.closed else ""
        return f"<moe_offload: {self.name}, {slots} slots for {experts} experts, {hits}{state}>"

    def _repr_html_(self) -> str:
        return to_html(self)

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

    def _recording(self) -> TraceRecorder:
        if self._recorder is None:
            raise TraceError("no trace is being recorded: call model.moe_offload.start_trace() before the run")
        return self._recorder


def _line(handle: Handle | None) -> bytes | None:
    return None if handle is None or handle.closed else handle._snapshot().to_json()
