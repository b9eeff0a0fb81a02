"""What an offloaded model records of its runs: a profile always, a trace and a timeline once they are started."""

from __future__ import annotations

from pathlib import Path

from ..errors import TraceError
from ..observe import chrome_trace
from ..observe.profile import Profile
from ..observe.timeline import Timeline
from ..observe.trace import Trace
from ..observe.trace.recorder import ForwardRecord, TraceRecorder
from ..ranks.merge import gather_uses, save_once
from .state import State


class Recording(State):
    """Which experts were used (profile), in which order (trace), and what happened when (timeline)."""

    _recorder: TraceRecorder | None = None
    _timeline: Timeline | None = None

    def profile(self, **meta: str) -> Profile:
        """The activation profile so far: how often each layer used each expert, since the model was optimised.

        Where several ranks share the experts, every rank calls it, and gets the uses of all experts.

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
        if self.ranks is not None:
            counters = gather_uses(self.ranks, self.moe_layers, counters)
        return Profile.of_layers(self.fingerprint, counters, meta)

    def save_profile(self, path: str | Path, **meta: str) -> Path:
        """Write the profile so far to a file, whole or not at all. Load it with `optimize(..., profile=path)`.

        Where several ranks share the experts, every rank calls it, rank 0 writes, and all return when it has. The file
        is for any number of ranks.

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
        profile = self.profile(**meta)
        return profile.save(path) if self.ranks is None else save_once(self.ranks, profile, Path(path))

    def start_trace(self) -> None:
        """Write down from now on which experts are asked for, forward by forward: 64 MB of ids at most.

        Raises:
            TraceError: The device decides what is in the slots, or several ranks share the experts, and nobody hears
                of all ids.
            ClosedError: The model was closed.

        Example:

            ```python
            model.moe_offload.start_trace()
            model.generate(**inputs)
            model.moe_offload.save_trace("run.npz")  # moe-offload simulate run.npz
            ```
        """
        if self.ranks is not None:
            raise TraceError(
                "several ranks share the experts, and none hears of all ids; to record a trace, run in one process"
            )
        if self._runtime.device_caches is not None:
            raise TraceError(
                "the device decides which experts are in the slots, and the host does not hear their ids; to record a "
                "trace, load the model with config={'decide': 'host'}"
            )
        layers = self._runtime.layers
        self._recorder = TraceRecorder([layer.cache for layer in layers], [layer.moe.top_k for layer in layers])
        self._runtime.record_trace(self._recorder)

    def trace(self, **meta: str) -> Trace:
        """What `start_trace` has recorded, for `simulate`. Started before the first token, without a profile
        or remembered usage, look-ahead and failed reads, it replays to the very hits, misses and bytes of `stats()`.

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
        return chrome_trace.save_chrome_trace(self._timeline, path, torch_profile)

    def _recording(self) -> TraceRecorder:
        if self._recorder is None:
            raise TraceError("no trace is being recorded: call model.moe_offload.start_trace() before the run")
        return self._recorder
