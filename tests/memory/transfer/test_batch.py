"""Copies of many rows by one call: with the arguments that the runtime at hand has, or not at all; what it refuses is
named; and rows that are not pinned, or a runtime without the call, are copied one by one as ever.

The stand-in is called through C: what is passed in another order, or too much, arrives wrong.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from moe_offload import OffloadError
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.transfer import batch as batched
from moe_offload.memory.transfer.batch import NO_INDEX, BatchCopy, find_batch_copy
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.memory.transfer.streams import CudaStreams
from tests.fakes.fault_store import LAYERS, LAYOUT, E, expected, make, prefill
from tests.fakes.racing_cuda import Machine
from tests.fakes.streams import HostStreams, InstantStreams

STREAM, INVALID, NEWER_DRIVER = 77_000, 1, 36
ROW = 4096


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Attributes(ctypes.Structure):
    """As driver_types.h of CUDA 12.8 and 13.0 has it."""

    _fields_ = (("order", ctypes.c_int), ("source", Location), ("target", Location), ("flags", ctypes.c_uint))


class Runtime:
    """A libcudart of that version, which copies on the host; `takes_index` as its header says. It answers `code`."""

    def __init__(self, version, takes_index=None, code=0, failed=NO_INDEX, copies=True):
        self.version, self.code, self.failed, self.copies = version, code, failed, copies
        self.calls, self.cleared = [], 0
        self.takes_index = version < 13000 if takes_index is None else takes_index
        p, n = ctypes.c_void_p, ctypes.c_size_t
        types = [p, p, p, n, p, p, n, *([p] if self.takes_index else []), p]
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._batch)
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.cudaMemcpyBatchAsync = ctypes.CFUNCTYPE(ctypes.c_int)(address)  # its arguments are the caller's to name
        self.cudaGetErrorName = lambda code: {INVALID: b"cudaErrorInvalidValue", NEWER_DRIVER: b"cudaErrorNewer"}[code]
        self.cudaGetErrorString = lambda code: b"in words"

        def get_version(pointer):
            pointer._obj.value = version
            return 0

        def get_last_error():
            self.cleared += 1
            return code

        self.cudaRuntimeGetVersion, self.cudaGetLastError = get_version, get_last_error
        for function in (self.cudaGetErrorName, self.cudaGetErrorString):
            function.restype = None  # a function of a library has such

    def _batch(self, targets, sources, sizes, count, attributes, first, number, *rest):
        targets, sources = ((ctypes.c_void_p * count).from_address(at) for at in (targets, sources))
        sizes = list((ctypes.c_size_t * count).from_address(sizes))
        one = Attributes.from_address(attributes)
        self.calls.append(
            SimpleNamespace(
                count=count, sizes=sizes, number=number, stream=rest[-1], order=one.order, flags=one.flags,
                hints=[one.source.type, one.source.id, one.target.type, one.target.id],
                first=ctypes.c_size_t.from_address(first).value,
            )
        )  # fmt: skip
        if self.takes_index:
            ctypes.c_size_t.from_address(rest[0]).value = self.failed
        if self.copies and not self.code:
            for target, source, size in zip(targets, sources, sizes, strict=True):
                ctypes.memmove(target, source, size)
        return self.code


def rows(n):
    return torch.arange(n, dtype=torch.uint8).repeat_interleave(ROW).view(n, ROW)


@pytest.mark.parametrize("version", [12080, 12090, 13000, 13020])
def test_each_version_is_called_as_its_header_says(version):
    runtime = Runtime(version)
    source, target = rows(5), torch.full((3, ROW), 9, dtype=torch.uint8)
    copies = [(target[i].data_ptr(), source[j].data_ptr(), n) for i, j, n in ((0, 4, ROW), (2, 1, 100), (1, 3, ROW))]
    find_batch_copy(runtime).copy(copies, STREAM)
    (call,) = runtime.calls
    assert (call.count, call.sizes, call.number, call.first, call.stream) == (3, [ROW, 100, ROW], 1, 0, STREAM)
    assert (call.order, call.flags, call.hints) == (1, 0, [0, 0, 0, 0]), "in the order of the stream, no hint"
    assert [sorted(set(row.tolist())) for row in target] == [[4], [3], [1, 9]]


@pytest.mark.parametrize(("version", "takes_index"), [(12080, False), (13000, True)])
def test_another_signature_than_the_version_s_would_be_seen(version, takes_index):
    """Of what the stand-in is told, the stream is the last: it is another one."""
    runtime = Runtime(version, takes_index=False)
    runtime.takes_index = False
    source = rows(2)
    one = BatchCopy(runtime, 13000 if takes_index else 12080)
    one.copy([(source[0].data_ptr(), source[1].data_ptr(), ROW)], STREAM)
    assert (runtime.calls[0].stream == STREAM) == takes_index


@pytest.mark.parametrize("version", [11080, 12070, 14000])
def test_no_other_version_is_called(version):
    assert find_batch_copy(Runtime(version)) is None


def test_a_runtime_without_the_call_has_none():
    assert find_batch_copy(SimpleNamespace()) is None
    assert find_batch_copy() is None or torch.version.cuda


@pytest.mark.parametrize(
    ("version", "failed", "says"), [(12080, 1, "of copy 1,"), (12080, NO_INDEX, ":"), (13000, 5, ":")]
)
def test_what_it_refuses_is_named(version, failed, says):
    runtime = Runtime(version, code=INVALID, failed=failed)
    source = rows(2)
    with pytest.raises(OffloadError, match=rf"(?s)cudaMemcpyBatchAsync has refused 2 copies.*{says}") as caught:
        find_batch_copy(runtime).copy([(source[i].data_ptr(), source[1 - i].data_ptr(), 8) for i in range(2)], STREAM)
    assert "cudaErrorInvalidValue (1), in words" in str(caught.value) and runtime.cleared == 1
    assert ("of copy" in str(caught.value)) == (says != ":")


@pytest.mark.parametrize("stream", [0, 1])
def test_never_on_a_default_stream(stream):
    with pytest.raises(AssertionError, match="default stream"):
        find_batch_copy(Runtime(13000)).copy([(1, 2, 3)], stream)


# On the stream beside.


@pytest.fixture
def streams(monkeypatch):
    """CUDA's streams without CUDA, whose copies are held against each other; and the runtime that is loaded."""

    def make_streams(runtime):
        machine = Machine()
        machine.patch(monkeypatch)
        Stream = torch.cuda.Stream
        monkeypatch.setattr(Stream, "cuda_stream", STREAM, raising=False)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        monkeypatch.setattr(batched, "_loaded_runtime", lambda: runtime)
        full = torch.full
        monkeypatch.setattr(torch, "full", lambda *args, **options: full(*args, **{**options, "device": "cpu"}))
        return CudaStreams(torch.device("cuda:0"))

    return make_streams


def copy_two(streams):
    bank, source = torch.zeros(4, ROW, dtype=torch.uint8), rows(4)
    streams.copy_all([bank[3], bank[1]], [source[2], source[3]], streams.mark())
    return [int(row[0]) for row in bank]


def test_rows_are_copied_by_one_call_once_it_has_been_tried_out(streams):
    runtime = Runtime(13000)
    made = streams(runtime)
    for _ in range(2):
        assert copy_two(made) == [0, 3, 0, 2]
    assert [call.count for call in runtime.calls] == [3, 2, 2] and {call.stream for call in runtime.calls} == {STREAM}


def test_a_driver_that_is_too_old_is_asked_once(streams):
    runtime = Runtime(12080, code=NEWER_DRIVER)
    made = streams(runtime)
    for _ in range(2):
        assert copy_two(made) == [0, 3, 0, 2]
    assert len(runtime.calls) == 1 and runtime.cleared == 1


def test_a_call_that_does_something_else_is_never_trusted_with_rows(streams):
    with pytest.raises(OffloadError, match="copies something else"):
        copy_two(streams(Runtime(13000, copies=False)))


def test_without_a_runtime_rows_are_copied_one_by_one(streams):
    assert copy_two(streams(None)) == [0, 3, 0, 2]


# Which rows, in a prompt and in a step of the host.


class Counting(InstantStreams):
    def __init__(self):
        self.batches, self.single = [], 0

    def copy_all(self, targets, sources, after):
        self.batches.append(len(targets))
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return True

    def copy(self, target, source, after, background=False):
        self.single += not background
        return super().copy(target, source, after, background)


def in_ram(pinned=range(LAYERS)):
    values = [
        torch.stack([torch.full((LAYOUT.row_bytes // 4,), 100.0 * i + e) for e in range(E)]) for i in range(LAYERS)
    ]
    return HostStore([one.view(torch.uint8) for one in values], pinned=pinned)


def prompts(store, streams, scratch_rows):
    """Layers that read nothing ahead: a row that is hurried on its way is copied alone."""
    runtime, _ = make(2, store, scratch_rows=scratch_rows, transfer=DeviceTransfer(streams))
    for layer in runtime.layers:
        layer.following = None
    return enumerate(runtime.layers)


@pytest.mark.parametrize("make_streams", [Counting, HostStreams])
def test_a_prompt_copies_the_rows_of_a_group_in_one_call(make_streams):
    streams = make_streams()
    for index, layer in prompts(in_ram(), streams, 8):
        for ids in ([*range(E)] * 3, [5, 5, 1, 2, 0, 7]):
            assert torch.equal(prefill(layer, ids), expected(index, ids))
    if make_streams is Counting:
        assert streams.batches[:3] == [2, 2, 2] and streams.single == 0, "a quarter of the scratch rows at a time"


@pytest.mark.parametrize("pinned", [(), (1,)])
def test_rows_that_are_not_pinned_are_copied_one_by_one(pinned):
    streams = Counting()
    for index, layer in prompts(in_ram(pinned), streams, 4):
        before = streams.single, len(streams.batches)
        assert torch.equal(prefill(layer, [*range(E)] * 3), expected(index, [*range(E)] * 3))
        assert (streams.single > before[0], len(streams.batches) > before[1]) == (index not in pinned, index in pinned)


@pytest.mark.parametrize("at", [1, 2])
def test_a_batch_that_is_refused_leaves_no_slot_with_another_row(at):
    class Refusing(Counting):
        def copy_all(self, targets, sources, after):
            if len(self.batches) + 1 == at:
                self.batches.append(0)
                raise OffloadError("refused on purpose")
            return super().copy_all(targets, sources, after)

    runtime, _ = make(4, in_ram(), scratch_rows=4, transfer=DeviceTransfer(Refusing()))
    layer = runtime.layers[0]
    with pytest.raises(OffloadError, match="on purpose"):
        prefill(layer, [*range(E)] * 3)
    assert not layer.arrivals.under_way and layer.arrivals.transfer._together is None
    for _ in range(2):
        assert torch.equal(prefill(layer, [*range(E)] * 3), expected(0, [*range(E)] * 3))
        assert torch.equal(prefill(layer, [1, 6, 3]), expected(0, [1, 6, 3]))
