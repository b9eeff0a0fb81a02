"""A timeline says what the counters say, on torch.profiler's clock; it is bounded, and refuses what it cannot use."""

from __future__ import annotations

import gzip
import json
import logging
from collections import defaultdict

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typer.testing import CliRunner

from moe_offload import TraceError
from moe_offload.apps.cli import app
from moe_offload.errors import ExpertReadError
from moe_offload.memory.transfer.threads import ThreadTransfer
from moe_offload.observe.chrome_trace import FORWARDS, PID, READERS, WAITS, save_chrome_trace
from moe_offload.observe.timeline import SHORT_S, Timeline
from tests.fakes.fault_store import FaultStore, K, decode, make
from tests.fakes.offloaded import IDS, offloaded, say
from tests.fakes.scripted_store import NOTHING, PARTS, ROW, ScriptedStore, row
from tests.paths import MODEL

TOLERANCE_US = 5000  # between two clocks of one machine


def ours(path):
    """Our events in a trace: slices by track, counters by name, names of tracks."""
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    slices, counters, names = defaultdict(list), defaultdict(list), {}
    for event in (event for event in trace["traceEvents"] if event["pid"] == PID):
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            slices[event["tid"]].append(event)
        elif event["ph"] == "C":
            assert event["ts"] >= 0 and all(value >= 0 for value in event["args"].values())
            counters[event["name"]].append(event)
        elif event["name"] in ("process_name", "thread_name"):
            names[event["tid"]] = event["args"]["name"]
    return slices, counters, names


def reads(slices):
    return [event for track, events in slices.items() if track >= READERS for event in events]


def record(runtime):
    timeline = Timeline([layer.cache for layer in runtime.layers])
    runtime.record_timeline(timeline)
    return timeline


# What it says is what happened.


@pytest.mark.parametrize(("layers", "name"), [(1, "run.json"), (2, "run.json.gz")])
def test_the_timeline_of_a_run_adds_up_to_its_counters(tmp_path, layers, name):
    model = offloaded(layers=layers)
    model.moe_offload.start_timeline()
    say(model, n=6)
    stats = model.moe_offload.stats()
    slices, counters, names = ours(model.moe_offload.save_timeline(tmp_path / name))
    assert [(e["name"], e["args"]["tokens"]) for e in slices[FORWARDS]] == [("prefill", 12), *[("decode", 1)] * 5]
    nbytes = sum(e["args"]["bytes"] for e in reads(slices))
    assert 0 < stats.bytes_read <= nbytes <= stats.bytes_read + stats.wasted_bytes
    assert stats.prewarm_bytes == 0 and (stats.wasted_bytes == 0 or layers > 1), "one layer reads nothing ahead"
    waited_s = sum(e["dur"] for e in slices[WAITS]) / 1e6
    assert 0 < waited_s and abs(stats.stall_s - waited_s) <= SHORT_S * 4 * (stats.misses + 12)
    begins = [e["ts"] for e in slices[FORWARDS]]
    ends = [e["ts"] + e["dur"] for e in slices[FORWARDS]]
    for event in (*slices[WAITS], *reads(slices)):
        assert any(begin <= event["ts"] for begin in begins) and event["ts"] + event["dur"] <= ends[-1]
    for event in slices[WAITS]:
        assert any(b <= event["ts"] and event["ts"] + event["dur"] <= e for b, e in zip(begins, ends, strict=True))
    assert counters["bytes in flight"][-1]["args"] == {"bytes": 0}
    assert max(event["args"]["bytes"] for event in counters["bytes in flight"]) > 0
    assert counters["queue depth"][-1]["args"] == {"demanded": 0, "background": 0}
    assert counters["resident rows"][-1]["args"] == {"rows": sum(layer.resident for layer in stats.layers)}
    assert counters["hit rate"][-1]["args"] == {"percent": round(100 * stats.hit_rate, 2)}
    assert len(counters["hit rate"]) == 6
    assert names[0] == "moe_offload" and names[FORWARDS] == "forwards" and names[WAITS] == "waits"
    assert all(name.startswith("moe_offload-read-") for track, name in names.items() if track >= READERS)


def test_a_batch_is_named_for_what_it_is(tmp_path):
    model = offloaded()
    model.moe_offload.start_timeline()
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5], [6], [7]])).past_key_values
        model(input_ids=torch.tensor([[6], [7], [8]]), past_key_values=cache)
        model(torch.tensor([[5, 6], [6, 7]]))
    slices, _, _ = ours(model.moe_offload.save_timeline(tmp_path / "run.json"))
    assert [(e["name"], e["args"]) for e in slices[FORWARDS]] == [
        ("prefill", {"tokens": 3, "sequences": 3}),
        ("decode", {"tokens": 3, "sequences": 3}),
        ("prefill", {"tokens": 4, "sequences": 2}),
    ]


@pytest.mark.parametrize("name", ["torch.json", "torch.json.gz"])
def test_it_is_on_the_clock_of_torch_profiler(tmp_path, name):
    model = offloaded(layers=2)
    model.moe_offload.start_timeline()
    with torch.no_grad():
        model(IDS)  # compiles
        with profile(activities=[ProfilerActivity.CPU]) as torch_profile:
            for i in range(3):
                with record_function(f"step {i}"):
                    model(IDS)
    torch_profile.export_chrome_trace(str(tmp_path / name))
    merged = model.moe_offload.save_timeline(tmp_path / "merged.json", torch_profile=tmp_path / name)
    theirs = [event for event in json.loads(merged.read_text())["traceEvents"] if event["pid"] != PID]
    steps = sorted((e for e in theirs if str(e["name"]).startswith("step ")), key=lambda e: e["ts"])
    forwards = ours(merged)[0][FORWARDS][1:]
    assert len(steps) == len(forwards) == 3
    for step, forward in zip(steps, forwards, strict=True):
        assert step["ts"] - TOLERANCE_US <= forward["ts"]
        assert forward["ts"] + forward["dur"] <= step["ts"] + step["dur"] + TOLERANCE_US
    assert sum(e["name"] == "moe_offload::stream" for e in theirs) == 6, "torch.profiler names our ops by itself"


@pytest.mark.parametrize("fault", [ExpertReadError("EIO"), "short"])
def test_a_read_that_fails_closes_its_slice_and_counts_no_bytes(tmp_path, fault):
    runtime, _ = make(K, FaultStore(2, fault))
    timeline = record(runtime)
    with pytest.raises(ExpertReadError):
        decode(runtime.layers[0], [0, 1])
    assert [(read.expert, read.error, read.nbytes > 0) for read in timeline.reads] == [
        (0, "", True), (1, "ExpertReadError", False)
    ]  # fmt: skip
    decode(runtime.layers[0], [0, 1])
    slices, counters, _ = ours(save_chrome_trace(timeline, tmp_path / "run.json"))
    assert [event["args"].get("failed") for event in reads(slices)] == [None, "ExpertReadError", None]
    assert sum(e["args"]["bytes"] for e in reads(slices)) == runtime.layers[0].cache.counters.bytes_read
    assert counters["bytes in flight"][-1]["args"] == {"bytes": 0}


def test_what_is_given_up_is_in_flight_no_more():
    transfer = ThreadTransfer(1)
    timeline = transfer.timeline = Timeline([])
    with transfer._changed:  # nothing is taken up
        transfer.cancel([transfer.start(ScriptedStore(), 0, e, row(), demanded=e > 0) for e in range(3)])
    assert tuple(timeline.depths[2][1]) == (2, 1, 0, 3 * ROW) and tuple(timeline.depths[-1][1]) == NOTHING
    assert timeline.reads == []
    transfer.close()


def test_parts_queues_and_urgency():
    """One thread, held at the first part of its first row: what is queued meanwhile can be told exactly."""
    transfer = ThreadTransfer(1)
    timeline = transfer.timeline = Timeline([])
    seen = []
    store = ScriptedStore(lambda expert, part: seen.append(transfer.depth()))
    with transfer._changed:  # nothing is taken up before all four are queued
        first = transfer.start(store, 2, 0, row())
        rest = [transfer.start(store, 2, e, row(), demanded=False) for e in (1, 2, 3)]
        transfer.hurry(rest[2])
    for ticket in (first, *rest):
        transfer.wait(ticket)
    transfer.close()
    assert [tuple(depth) for _, depth in timeline.depths[:5]] == [
        (1, 0, 0, ROW), (1, 1, 0, 2 * ROW), (1, 2, 0, 3 * ROW), (1, 3, 0, 4 * ROW), (2, 2, 0, 4 * ROW)
    ]  # fmt: skip
    assert seen[0] == (2, 2, 1, 4 * ROW) and seen[PARTS - 1] == (1, 2, 1, 4 * ROW)
    assert seen[-1] == (0, 0, 1, ROW) and tuple(timeline.depths[-1][1]) == NOTHING
    assert [(r.layer, r.expert, r.demanded, r.nbytes) for r in timeline.reads[::PARTS]] == [
        (2, 0, True, ROW // PARTS), (2, 3, True, ROW // PARTS), (2, 1, False, ROW // PARTS), (2, 2, False, ROW // PARTS)
    ]  # fmt: skip
    assert len(timeline.reads) == 4 * PARTS and {r.thread for r in timeline.reads} == {"moe_offload-read-0"}


def test_bytes_are_shared_out_to_the_last_one():
    timeline = Timeline([])
    parts = [read for _ in range(3) for read in timeline.read(0, 1, True, timeline.begun_s, None)]
    timeline.arrived(parts, 100)
    assert [part.nbytes for part in parts] == [33, 33, 34]


def test_waits_in_a_row_are_one():
    timeline = Timeline([])
    timeline.wait(0, 1, 1.0, 1.5)
    timeline.wait(0, 1, 1.5, 1.75)  # nothing computed in between
    timeline.wait(0, 1, 1.8, 1.9)
    timeline.wait(1, 1, 1.9, 2.0)
    timeline.wait(1, 0, 3.0, 3.0 + SHORT_S / 2)  # a look, no wait
    assert [(w.layer, w.rows, w.begun_s, w.ended_s) for w in timeline.waits] == [
        (0, 2, 1.0, 1.75), (0, 1, 1.8, 1.9), (1, 1, 1.9, 2.0)
    ]  # fmt: skip


def test_a_full_timeline_stops_and_says_so_once(tmp_path, caplog):
    runtime, _ = make(K)
    timeline = Timeline([layer.cache for layer in runtime.layers], max_events=10)
    runtime.record_timeline(timeline)
    with caplog.at_level(logging.WARNING, "moe_offload"):
        for expert in range(8):
            decode(runtime.layers[0], [expert])
    assert len([r for r in caplog.records if "timeline is full" in r.message]) == 1
    assert len(timeline.reads) + len(timeline.depths) + len(timeline.waits) == 10
    ours(save_chrome_trace(timeline, tmp_path / "run.json"))


def test_nothing_is_recorded_before_start_and_a_second_start_begins_anew(tmp_path):
    model = offloaded()
    say(model, n=2)
    assert model.moe_offload._runtime.timeline is None
    model.moe_offload.start_timeline()
    say(model, n=4)
    model.moe_offload.start_timeline()
    say(model, n=2)
    slices, _, _ = ours(model.moe_offload.save_timeline(tmp_path / "run.json"))
    assert len(slices[FORWARDS]) == 2
    model.moe_offload.close()
    assert model.moe_offload.save_timeline(tmp_path / "closed.json").exists(), "what was recorded outlives the model"


# What it refuses.


def test_saving_what_was_not_started_or_holds_nothing(tmp_path):
    handle = offloaded().moe_offload
    with pytest.raises(TraceError, match=r"start_timeline\(\) before the run"):
        handle.save_timeline(tmp_path / "run.json")
    handle.start_timeline()
    with pytest.raises(TraceError, match="is empty: run the model"):
        handle.save_timeline(tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def timeline():
    runtime, _ = make(K)
    timeline = record(runtime)
    decode(runtime.layers[0], [0, 1])
    return timeline


def foreign(**changes):
    return json.dumps({"baseTimeNanoseconds": 0, "traceEvents": [], **changes}).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "No such file"),
        (b"", "Expecting value"),
        (b"{", "Expecting property"),
        (b"\xff\xfe\x00", "can't decode|cannot decode|codec"),
        (b"[]", "no list of traceEvents"),
        (b'{"traceEvents": [3]}', "no list of traceEvents"),
        (b'{"traceEvents": []}', "baseTimeNanoseconds"),
        (foreign(baseTimeNanoseconds="0"), "baseTimeNanoseconds"),
        (b"[" * 100_000, "nested too deep"),
        (b"\x1f\x8b", "ended before|end-of-stream"),
        (b"\x1f\x8babcdefgh" * 20, "cannot be used"),
        (gzip.compress(foreign(), mtime=0)[:-9], "ended before|end-of-stream|CRC"),
        (foreign(), "no moment in common"),
        (foreign(traceEvents=[{"ph": "X", "ts": 1, "dur": 5}, {"ph": "X", "ts": "x"}]), "no moment in common"),
    ],
)
def test_a_profile_that_cannot_be_used(tmp_path, timeline, data, says):
    theirs, out = tmp_path / "torch.json", tmp_path / "out.json"
    if data is not None:
        theirs.write_bytes(data)
    out.write_text("old")
    with pytest.raises(TraceError, match=says) as caught:
        save_chrome_trace(timeline, out, torch_profile=theirs)
    assert (
        "torch.json" in str(caught.value) and "export_chrome_trace" in str(caught.value)
    ) or "Let the profiler" in str(caught.value)
    assert out.read_text() == "old"


def test_a_profile_that_unpacks_to_too_much(tmp_path, timeline, monkeypatch):
    monkeypatch.setattr("moe_offload.observe.chrome_trace.MAX_BYTES", 100)
    (tmp_path / "torch.json").write_bytes(gzip.compress(b" " * 101))
    with pytest.raises(TraceError, match="more than 100 bytes"):
        save_chrome_trace(timeline, tmp_path / "out.json", torch_profile=tmp_path / "torch.json")


def test_a_place_that_cannot_be_written(tmp_path, timeline):
    for path in (tmp_path / "no" / "run.json", tmp_path):
        with pytest.raises(TraceError, match="was not saved"):
            save_chrome_trace(timeline, path)


def test_timeline_out(tmp_path):
    out = tmp_path / "run.json"
    arguments = ["run", str(MODEL), "--budget", "6MB", "--prompt", "Il comando", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, [*arguments, "--save-timeline", str(out)])
    assert result.exit_code == 0, result.output
    assert f"timeline saved to {out}" in result.stderr and "timeline" not in result.stdout
    assert [e["name"] for e in ours(out)[0][FORWARDS]] == ["prefill", *["decode"] * 3]
    result = CliRunner().invoke(app, [*arguments, "--save-timeline", str(tmp_path / "no" / "run.json")])
    assert result.exit_code == 2 and "--save-timeline" in result.output and "does not exist" in result.output
