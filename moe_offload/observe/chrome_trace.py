"""A timeline as a Chrome trace, for ui.perfetto.dev and chrome://tracing: alone, or in one with torch.profiler's.

    tracks     forwards, waits, one for each reader thread
    counters   hit rate, resident rows, bytes in flight, queue depth

`ts` and `dur` are microseconds. torch.profiler counts them from `baseTimeNanoseconds` of the day (seen in torch 2.13),
and so do we; its file comes back with our events added.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TraceError
from ..files.untrusted import open_regular, refusing_file
from ..files.whole_file import save_whole
from .timeline import Timeline

PID = 2**22  # ours among processes: one more than Linux gives to any
FORWARDS, WAITS, READERS = 1, 2, 3  # tracks; readers have theirs from there on
MAX_BYTES = 2**30  # of a profile, unpacked
MAX_RATIO = 100  # unpacked to packed: JSON that is text of events stays below it, what was made to fill memory does not
BASE = "baseTimeNanoseconds"

Event = dict[str, Any]


def save_chrome_trace(
    timeline: Timeline, path: str | os.PathLike[str], torch_profile: str | os.PathLike[str] | None = None
) -> Path:
    """Write the trace to `path` (compressed if it ends in .gz), with what `torch_profile` holds; return `path`.

    All or nothing: on any failure (TraceError) an old file is as it was.
    """
    if not (timeline.forwards or timeline.reads):
        raise TraceError("the timeline is empty: run the model between start_timeline() and save_timeline()")
    path = Path(path)
    trace: Event = {"displayTimeUnit": "ms", BASE: timeline.begun_ns, "traceEvents": []}
    if torch_profile is not None:
        trace = _read(Path(torch_profile))
    ours = list(make_events(timeline, trace[BASE]))
    if torch_profile is not None:
        _check_overlap(trace["traceEvents"], ours, torch_profile)
    trace["traceEvents"] += ours
    data = json.dumps(trace, separators=(",", ":")).encode()
    return save_whole(path, gzip.compress(data, 6) if path.suffix == ".gz" else data, "timeline", TraceError)


def make_events(timeline: Timeline, base_ns: int) -> Iterator[Event]:
    """The events of a Chrome trace, times counted from `base_ns` of the day."""
    ahead_us = (timeline.begun_ns - base_ns) / 1000

    def at(time_s: float) -> float:
        return round(ahead_us + (time_s - timeline.begun_s) * 1e6, 3)

    def slice_(track: int, name: str, begun_s: float, ended_s: float, **args: Any) -> Event:
        begun, ended = at(begun_s), at(ended_s)
        times = {"ts": begun, "dur": round(ended - begun, 3)}
        return {"ph": "X", "cat": "moe_offload", "name": name, "pid": PID, "tid": track, **times, "args": args}

    def counter(name: str, time_s: float, **values: float) -> Event:
        return {"ph": "C", "name": name, "pid": PID, "tid": 0, "ts": at(time_s), "args": values}

    reads = list(timeline.reads)  # reader threads may be adding to it
    readers = {name: READERS + i for i, name in enumerate(sorted({read.thread for read in reads}))}
    yield from _names(readers)
    for forward in timeline.forwards:
        name = "decode" if forward.decode else "prefill"
        sizes = {"tokens": forward.sequences * forward.tokens, "sequences": forward.sequences}
        yield slice_(FORWARDS, name, forward.begun_s, forward.ended_s, **sizes)
    for wait in timeline.waits:
        where = {"layer": wait.layer, "module": timeline.caches[wait.layer].name}
        yield slice_(WAITS, f"wait, layer {wait.layer}", wait.begun_s, wait.ended_s, **where, rows=wait.rows)
    for read in reads:
        args: dict[str, Any] = {"layer": read.layer, "expert": read.expert, "bytes": read.nbytes}
        args["queue"] = "demanded" if read.demanded else "background"
        if read.error or not read.nbytes:
            args["failed"] = read.error or "given up"
        name = f"layer {read.layer}, expert {read.expert}"
        yield slice_(readers[read.thread], name, read.begun_s, read.ended_s, **args)
    for time_s, depth in timeline.depths:
        yield counter("queue depth", time_s, demanded=depth.demanded, background=depth.background)
        yield counter("bytes in flight", time_s, bytes=depth.nbytes)
    for state in timeline.states:
        yield counter("resident rows", state.at_s, rows=state.resident)
        if state.hit_rate is not None:
            yield counter("hit rate", state.at_s, percent=round(100 * state.hit_rate, 2))


def _names(readers: dict[str, int]) -> Iterator[Event]:
    def meta(kind: str, track: int, **args: Any) -> Event:
        return {"ph": "M", "name": kind, "pid": PID, "tid": track, "args": args}

    yield meta("process_name", 0, name="moe_offload")
    yield meta("process_labels", 0, labels=f"process {os.getpid()}")
    yield meta("process_sort_index", 0, sort_index=-1)  # above those of torch.profiler
    for name, track in {"forwards": FORWARDS, "waits": WAITS, **readers}.items():
        yield meta("thread_name", track, name=name)
        yield meta("thread_sort_index", track, sort_index=track)


def _read(path: Path) -> Event:
    """What torch.profiler exported to `path`, compressed or not. Raises TraceError."""
    remedy = "It takes what export_chrome_trace of a torch.profiler.profile has written"
    with refusing_file(path, "torch_profile", remedy, TraceError):
        trace: Event = json.loads(_unpacked(path))
        listed = trace.get("traceEvents") if isinstance(trace, dict) else None
        if not isinstance(listed, list) or not all(isinstance(event, dict) for event in listed):
            raise ValueError("it has no list of traceEvents")
        if type(trace.get(BASE)) is not int:
            raise ValueError(f"it does not say when its clock begins ({BASE})")
        return trace


def _unpacked(path: Path) -> bytes:
    with open_regular(path) as (file, size):
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        most = min(MAX_BYTES, MAX_RATIO * size) if packed else MAX_BYTES
        try:
            with gzip.GzipFile(fileobj=file) if packed else file as source:
                data = source.read(most + 1)
        except (EOFError, zlib.error) as error:
            raise ValueError(str(error)) from error
    if len(data) > most:
        raise ValueError(f"it holds more than {most} bytes; profile fewer steps")
    return data


def _check_overlap(theirs: list[Event], ours: list[Event], torch_profile: str | os.PathLike[str]) -> None:
    """Raise TraceError if the profile is of another time: its events would be drawn hours away from the timeline's."""
    (begin, end), (own_begin, own_end) = _extent(theirs), _extent(ours)
    if begin > own_end or own_begin > end:
        raise TraceError(
            f"torch_profile {os.fspath(torch_profile)!r} cannot be used: it and the timeline have no moment in common. "
            "Let the profiler run between start_timeline() and save_timeline(), around some of the same forwards"
        )


def _extent(events: list[Event]) -> tuple[float, float]:
    timed = [e for e in events if all(isinstance(e.get(key), int | float) for key in ("ts", "dur"))]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in timed]
    return min((begin for begin, _ in spans), default=0.0), max((end for _, end in spans), default=0.0)
