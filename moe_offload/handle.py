"""`model.moe_offload`: what a user asks of an offloaded model."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from .cache.counters import TOTALS, Stats
from .config.sizes import format_size
from .errors import TraceError
from .experts import MoELayer
from .observe import chrome_trace
from .observe.live.server import LiveView, open_view
from .observe.live.snapshot import LayerNow, Snapshot
from .observe.metrics import LOCAL, Exporter, registry_of
from .observe.notebook import to_html
from .observe.profile import Fingerprint, Profile
from .observe.timeline import Depth, Timeline
from .observe.trace import Trace
from .observe.trace_recorder import ForwardRecord, Recorder
from .plan.arrange import Arrangement
from .plan.budget import Plan
from .plan.explain import explain
from .runtime.model import Runtime


class Handle:
    """The offload state of one model: `print` it, read `stats()`, `save_profile()`, `close()`.

    A context manager too: `with model.moe_offload as handle: ...` closes it at the end.
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
        self._recorder: Recorder | None = None
        self._live: LiveView | None = None
        self._exporters: list[Exporter] = []
        self.begun = time.monotonic()
        self._timeline: Timeline | None = None

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [layer.moe for layer in self._runtime.layers]

    @property
    def arrangement(self) -> Arrangement:
        """Where everything is now: slots may have been given back since (`shrink.py`)."""
        return self._arranged.with_slots(self._runtime.slots)

    @property
    def plan(self) -> Plan:
        return self.arrangement.plan

    @property
    def closed(self) -> bool:
        return self._runtime.closed

    @property
    def name(self) -> str:
        """What the model calls itself: the name of its repository or of its folder, or else its class."""
        name = str(getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__)
        name = Path(name).resolve().name if Path(name).is_absolute() or Path(name).exists() else name
        return "".join(c for c in name if c.isprintable())[:200] or type(self.model).__name__

    def stats(self) -> Stats:
        """Counters as of now; `stats().layers` has them per layer."""
        layers: list[dict[str, Any]] = []
        for layer in self._runtime.layers:
            c = layer.counters
            layers.append(
                {
                    "name": layer.moe.name,
                    "slots": layer.cache.slots,
                    "experts": layer.moe.num_experts,
                    "resident": layer.resident,
                    "tokens": c.tokens,
                    "decides": "device" if layer.moe.index in self._runtime.device_layers else "host",
                    **{name: getattr(c, name) for name in TOTALS},
                }
            )
        totals = {name: sum(row[name] for row in layers) for name in TOTALS}
        tokens = max((row["tokens"] for row in layers), default=0)
        return Stats(**totals, tokens=tokens, graphs=len(self.graphs), layers=layers)

    def depth(self) -> Depth:
        """Rows queued, and being read, as of now."""
        return self._runtime.depth()

    def snapshot(self) -> dict[str, Any]:
        """State and counters as of now, as plain JSON values (`live/snapshot.py`). From any thread; waits for none."""
        return self._snapshot().model_dump()

    def _snapshot(self) -> Snapshot:
        stats, depth = self.stats(), self.depth()
        names = [name for name in Snapshot.model_fields if name in stats.__dataclass_fields__ and name != "layers"]
        return Snapshot(
            **{name: getattr(stats, name) for name in names},
            model=self.name,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self.begun,
            budget_bytes=self.plan.budget_bytes,
            plan=dict(self.plan.rows()),
            rss_bytes=psutil.Process().memory_info().rss,
            queued=depth.demanded + depth.background,
            reading=depth.reading,
            layers=[
                LayerNow(**{**row, "name": row["name"][:256]}, row_bytes=layer.row_bytes)
                for row, layer in zip(stats.layers, self.plan.layers, strict=True)
            ],
        )

    def serve_live(self) -> Path | None:
        """Let `moe-offload top` watch this model, until it is closed. Returns the path of the socket, or None where
        that cannot be done (which is logged); the model runs on either way. It costs nothing while nobody looks."""
        self._runtime.check_open()
        if self._live is None:
            this = weakref.ref(self)  # the view must not keep a model alive that nobody else needs
            self._live = open_view(lambda: _line(this()))
            if self._live is not None:
                weakref.finalize(self, self._live.close)
        return None if self._live is None else self._live.path

    def metrics(self, per_layer: bool = False) -> Any:
        """A `prometheus_client` registry of this model alone, read when it is scraped; `per_layer` adds that label.

        Mount it with `prometheus_client.make_asgi_app(registry)`. Needs prometheus_client (the extra `metrics`).
        """
        return registry_of(self, per_layer)

    def serve_metrics(self, port: int, addr: str = LOCAL, per_layer: bool = False) -> str:
        """Serve `metrics()` over HTTP until the model is closed; returns the URL. Port 0 takes one that is free.

        Raises ConfigError where the port cannot be had.
        """
        self._runtime.check_open()
        exporter = Exporter(self.metrics(per_layer), port, addr)
        self._exporters.append(exporter)
        weakref.finalize(self, exporter.close).atexit = False  # its thread ends with the process
        return exporter.url

    def profile(self, **meta: str) -> Profile:
        """The activation profile so far: how often each layer used each expert."""
        counters = [layer.counters.snapshot() for layer in self._runtime.layers]
        return Profile.of(
            self.fingerprint,
            tokens=max((layer.tokens for layer in counters), default=0),
            counts=[layer.counts for layer in counters],
            meta=meta,
        )

    def save_profile(self, path: str | Path, **meta: str) -> Path:
        """Write the profile so far to `path`, atomically. Load it with `optimize(..., profile=path)`."""
        return self.profile(**meta).save(path)

    def explain(self) -> str:
        """Which rule put what where, and what was not offloaded and why."""
        return explain(self.model, self.moe_layers, self.arrangement)

    def start_trace(self) -> None:
        """Write down from now on which experts are asked for, forward by forward (64 MB at most)."""
        if self._runtime.device_caches is not None:
            raise TraceError(
                "the device decides which experts are in the slots, and the host does not hear their ids; to record a "
                "trace, load the model with config={'decide': 'host'}"
            )
        layers = self._runtime.layers
        self._recorder = Recorder([layer.cache for layer in layers], [layer.moe.top_k for layer in layers])
        self._runtime.record(self._recorder)

    def trace(self, **meta: str) -> Trace:
        """What `start_trace` has recorded, for `simulate`. Started before the first token, without a profile,
        look-ahead and failed reads, it replays to the very hits, misses and bytes of `stats()`."""
        facts = {
            "model_type": self.fingerprint.model_type,
            "row_bytes": str(max(moe.layout.row_bytes for moe in self.moe_layers)),
            "slots": ",".join(map(str, self.plan.slots)),
        }
        with self._runtime.lock:
            return self._recording().trace({**facts, **meta})

    def save_trace(self, path: str | Path, **meta: str) -> Path:
        """Write the trace to `path` (.npz), atomically."""
        return self.trace(**meta).save(path)

    def steps(self) -> list[ForwardRecord]:
        """What every forward since `start_trace` took: when, how many tokens, hits, misses, bytes, waiting."""
        with self._runtime.lock:
            return self._recording().steps()

    def recorded_s(self) -> float:
        """Seconds from `start_trace` to now, or to where the trace was full."""
        return self._recording().passed_s()

    def start_timeline(self) -> None:
        """Write down from now on what happens when: forwards, waits, reads, queues (200,000 events at most)."""
        timeline = Timeline([layer.cache for layer in self._runtime.layers])
        self._runtime.record_timeline(timeline)
        self._timeline = timeline

    def save_timeline(self, path: str | Path, torch_profile: str | Path | None = None) -> Path:
        """Write what `start_timeline` has recorded to `path`, atomically: a Chrome trace (.json or .json.gz), for
        ui.perfetto.dev.

        `torch_profile`: what `export_chrome_trace` of a torch.profiler has written about the same forwards; `path` then
        holds both, on one clock. Raises `TraceError`.
        """
        if self._timeline is None:
            raise TraceError("no timeline is being recorded: call model.moe_offload.start_timeline() before the run")
        return chrome_trace.save(self._timeline, path, torch_profile)

    def _recording(self) -> Recorder:
        if self._recorder is None:
            raise TraceError("no trace is being recorded: call model.moe_offload.start_trace() before the run")
        return self._recorder

    def close(self) -> None:
        """Give back files and memory. The model (and its `state_dict`) raises `ClosedError` from then on."""
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
        s, tiers = self.stats(), ", ".join(sorted(set(self.tiers)))
        state = "closed" if self.closed else f"{self.implementation}, {self.compile}, {s.graphs} graphs compiled"
        return "\n".join([str(self.plan), f"rows below the slots rest in: {tiers};  {state}", self.summary()])

    def summary(self) -> str:
        """What has happened so far, in a line or two: tokens, hits, bytes; what was read ahead, if anything was."""
        s, lines = self.stats(), []
        if s.hits + s.misses:
            read = format_size(s.bytes_read)
            lines.append(
                f"{s.tokens} tokens: hit rate {s.hit_rate:.1%} ({s.hits} hits, {s.misses} misses, {s.streamed} of them "
                f"streamed past the cache), {read} read, {s.stall_s:.2f} s waited"
            )
            if s.ahead or s.wasted_bytes:
                lines.append(
                    f"read ahead: {s.ahead} rows that were then asked for ({s.late} of them late), "
                    f"{format_size(s.wasted_bytes)} in vain"
                )
            if self._runtime.device_layers:
                layers = [row["decides"] for row in s.layers]
                lines.append(
                    f"the device decides in {layers.count('device')} of {len(layers)} layers: it did in {s.by_device} "
                    f"of {s.events} events, the host in {s.by_host}"
                )
        else:
            lines.append("nothing has run yet")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return to_html(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<moe_offload: {sum(self.plan.slots)} slots in {len(self.plan.slots)} layers, {state}>"


def _line(handle: Handle | None) -> bytes | None:
    return None if handle is None or handle.closed else handle._snapshot().model_dump_json().encode()
