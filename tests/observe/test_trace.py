"""Traces: what is saved is loaded, events are those of the forwards, and nothing else comes out of any file."""

from __future__ import annotations

import io
import json
import os
import resource
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload.apps.simulate.stream import per_layer, pool_layers
from moe_offload.errors import TraceError
from moe_offload.files import npz
from moe_offload.observe.trace import Trace

EXPERTS = np.array([[[0, 1], [2, 3]], [[1, 2], [3, -1]], [[0, 3], [-1, -1]], [[3, 1], [0, 1]]])


def trace(**changes):
    return Trace.of(EXPERTS, [0, 3], **{"event_start": [0, 1, 3], "num_experts": [4, 5], "meta": {"a": "b"}, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.npz"


def refused(path, found):
    with pytest.raises(TraceError, match=found) as error:
        Trace.load(path)
    assert repr(os.fspath(path)) in str(error.value) and len(str(error.value)) < 1500


def test_round_trip(path):
    weights = np.linspace(0, 1, EXPERTS.size, dtype=np.float16).reshape(EXPERTS.shape)
    trace(weights_TLK=weights).save(path)
    loaded = Trace.load(path)
    assert (loaded.experts_TLK == EXPERTS).all() and (loaded.weights_TLK == weights).all()
    assert loaded.request_start.tolist() == [0, 3] and loaded.event_start.tolist() == [0, 1, 3]
    assert (loaded.num_experts, loaded.meta) == ((4, 5), {"a": "b"})


def test_events_are_the_distinct_experts_of_a_forward():
    first, second = ([(dict(e.used), e.tokens) for e in stream.events()] for stream in per_layer(trace()))
    assert first == [({0: 1, 1: 1}, 1), ({1: 1, 2: 1, 0: 1, 3: 1}, 2), ({3: 1, 1: 1}, 1)]
    assert second == [({2: 1, 3: 1}, 1), ({3: 1}, 1), ({0: 1, 1: 1}, 1)]  # row 2 is padding in this layer
    assert [list(e.used) for e in pool_layers(trace()).events()] == [[0, 1], [6, 7], [1, 2, 0, 3], [7], [3, 1], [4, 5]]


def test_requests_are_traces_of_their_own():
    last = trace().requests(1, 2)
    assert last.tokens == 1 and last.event_start.tolist() == last.request_start.tolist() == [0]
    with pytest.raises(TraceError, match="requests 1 to 3 were asked for; the trace has 2"):
        trace().requests(1, 3)


def test_experts_that_were_never_used_are_stated_beside_a_shared_trace(path):
    np.savez(path, experts=EXPERTS)
    assert Trace.load(path).num_experts == (4, 4)
    path.with_suffix(".json").write_text('{"n_experts": 8}')
    assert Trace.load(path).num_experts == (8, 8)


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({}, "no array 'experts'"),
        ({"counts": EXPERTS}, "no array 'experts'"),
        ({"experts": EXPERTS[0]}, "shape"),
        ({"experts": EXPERTS[:0]}, "shape"),
        ({"experts": EXPERTS.astype(float)}, "not integers"),
        ({"experts": EXPERTS * np.nan}, "not integers"),
        ({"experts": EXPERTS - 1}, "expert ids are -2 to 2"),
        ({"experts": EXPERTS * 0 - 1}, "not all -1"),
        ({"experts": EXPERTS + 2**40}, "expert ids"),
        ({"experts": np.ones_like(EXPERTS)}, "token 0 names an expert of layer 0 twice"),
        ({"experts": EXPERTS, "num_experts": np.array([4, 3])}, "layer 1 uses expert 3"),
        ({"experts": EXPERTS, "num_experts": np.array([4, 3, 3])}, "for 2 layers"),
        ({"experts": EXPERTS, "num_experts": np.array([4, 2**40])}, "num_experts is"),
        ({"experts": EXPERTS, "request_start": np.array([0, 4])}, "below 4 tokens"),
        ({"experts": EXPERTS, "request_start": np.array([1])}, "begin with 0"),
        ({"experts": EXPERTS, "request_start": np.array([0, 2, 2])}, "increase"),
        ({"experts": EXPERTS, "request_start": np.array([0, 2]), "event_start": np.array([0, 3])}, "inside a forward"),
        ({"experts": EXPERTS, "event_start": np.array([[0]])}, "not a list of row numbers"),
        ({"experts": EXPERTS, "weights": EXPERTS[:1] * 0.5}, "weights are"),
        ({"experts": EXPERTS, "weights": np.full(EXPERTS.shape, np.nan)}, "NaN or infinity"),
        ({"experts": np.array(["a"])}, "not of numbers"),
        ({"experts": EXPERTS, "meta": np.frombuffer(b"[1]", np.uint8)}, "meta"),
        ({"experts": EXPERTS, "meta": np.frombuffer(b"[" * 60000, np.uint8)}, "meta"),
        ({"experts": EXPERTS, "meta": np.zeros(2**17, np.uint8)}, "meta"),
    ],
    ids=str,
)
def test_what_no_router_chose(path, arrays, found):
    np.savez(path, **arrays)
    with np.errstate(invalid="ignore"):
        refused(path, found)


def test_objects_are_never_unpickled(path, tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (os.fspath(tmp_path / "canary"),)

    np.savez(path, experts=np.array([Canary()], dtype=object), allow_pickle=True)
    refused(path, "not of numbers")
    assert not (tmp_path / "canary").exists()


def header(shape, descr="<i8"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize(
    ("member", "found"),
    [
        (header((2**40, 1, 1)), "the limit is"),
        (header((2**20, 1, 1)), "states 8388608 bytes, and holds 0"),
        (header((0, 10**30, 1)), "cannot be used"),
        (header((-4, 1, 1)), "a header other than"),
        (b"nonsense", "magic"),
        (b"\x93NUMPY\x09\x00", "format"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "cannot be used"),
    ],
)
def test_a_header_that_promises_too_much(path, member, found):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("experts.npy", member)
    refused(path, found)


@pytest.mark.timeout(20)
def test_a_bomb_and_an_endless_directory(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("experts.npy", header((1, 1, 1)) + bytes(2**26))
    refused(path, "states 8 bytes, and holds 67108864")
    with zipfile.ZipFile(path, "w") as file:
        for i in range(2000):
            file.writestr(f"{i}.npy", b"")
    refused(path, "table of contents")
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(2**33)
    refused(path, "its end is missing")


@pytest.mark.timeout(20)
def test_what_is_no_file(path, tmp_path):
    refused(path, "No such file")
    refused(tmp_path, "not a regular file")
    refused("/dev/zero", "not a regular file")
    os.mkfifo(path)
    refused(path, "not a regular file")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 255)), min_size=1, max_size=4))
def test_damage_is_refused_or_harmless(path, changes):
    trace().save(path)
    data = bytearray(path.read_bytes())
    for at, flip in changes:
        data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        loaded = Trace.load(path)
    except TraceError:
        return
    assert all(int(loaded.experts_TLK[:, i].max()) < loaded.num_experts[i] for i in range(loaded.layers))


def test_truncation_at_every_byte(path):
    trace().save(path)
    data = path.read_bytes()
    for end in range(0, len(data), 3):
        path.write_bytes(data[:end])
        refused(path, "cannot be used")


def test_a_write_that_fails_leaves_the_old_trace(path):
    trace().save(path)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(TraceError, match="was not saved: File too large"):
            trace(meta={"another": "one"}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


def test_ids_beyond_the_arrays_wanted_are_not_read(path):
    trace().save(path)
    with path.open("rb") as file:
        assert set(npz.read_arrays(file, path.stat().st_size, {"experts", "absent"})) == {"experts"}
    assert json.loads(Trace.load(path).meta["a"].join('""')) == "b"
