"""Once more after the allocator has failed, without a model: what is said, what is raised, what is let go of."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from moe_offload.errors import OffloadError
from moe_offload.forward.binding import Scope
from moe_offload.forward.dynamo import Settings
from moe_offload.forward.out_of_memory.retry import Retry
from tests.fakes.fault_store import K, decode, expected, make


class Large:
    """Stands for an activation."""


class Model:
    """Asks the first layer; the forwards of the numbers `fails` run out of memory half way."""

    def __init__(self, slots=6, fails=(), error=None):
        self.runtime, _ = make(slots)
        self.fails, self.forwards, self.made, self.held = set(fails), 0, 0, []
        self.activation = None
        self.error = error or (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
        self.retry = Retry(self.runtime, Scope(self.runtime, Settings([], [])), self.compile_anew)

    def compile_anew(self):
        self.made += 1
        made = self.made

        def forward(ids, past=None):
            assert made == self.made, "a graph of the old banks"
            self.forwards += 1
            if self.activation is not None:
                self.held.append(self.activation() is not None)
                self.activation = None
            if past is not None:
                past.update(torch.ones(1, 1, len(ids), 4), torch.ones(1, 1, len(ids), 4), 0)
            if self.forwards in self.fails:
                self.deep()
            return decode(self.runtime.layers[0], ids)

        return forward

    def deep(self):
        activation = Large()
        self.activation = weakref.ref(activation)
        raise self.error()

    def __call__(self, ids, **options):
        return self.retry(1, len(ids), (ids,), options)


@pytest.fixture(autouse=True)
def a_device(caplog, monkeypatch):
    caplog.set_level(logging.WARNING, "moe_offload")
    monkeypatch.setattr(Retry, "_runs_out", lambda retry: True)


def test_on_a_cpu_caches_are_not_looked_at(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("moe_offload.forward.out_of_memory.retry.remember_caches", None)
    assert torch.equal(Model()([3, 4]), expected(0, [3, 4]))


def test_the_first_failure_costs_slots_and_a_line(caplog):
    model = Model(fails=[2, 4])
    for _ in range(2):
        assert torch.equal(model([3, 4]), expected(0, [3, 4]))
    assert model.runtime.slots == (4, 4) and model.made == 2
    assert model.held == [False], "what had been computed is let go of before"
    (said,) = caplog.messages
    assert "in a forward of 2 tokens: 16.38 KB" in said and "(4 instead of 6 in each layer)" in said
    assert "kv_tokens" in said and "prefill_chunk_size=512" in said
    assert torch.equal(model([3, 4]), expected(0, [3, 4])) and model.runtime.slots == (3, 3), "the next one likewise"


def test_a_second_failure_is_the_allocators_own_error_with_advice():
    model = Model(fails=[1, 2])
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Tried to allocate 2 GiB.*a second time, after 16.38 KB.*To"):
        model([3, 4])
    assert model.forwards == 2 and model.runtime.slots == (4, 4)
    assert torch.equal(model([3, 4]), expected(0, [3, 4]))


def test_at_the_floor_nothing_is_tried():
    model = Model(slots=K, fails=[1])
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Tried to allocate.*no layer has a slot to spare.*budget"):
        model([3, 4])
    assert model.forwards == 1 and model.runtime.slots == (K, K)
    assert torch.equal(model([3, 4]), expected(0, [3, 4]))


def test_a_cache_is_put_back_first():
    model, past = Model(fails=[2]), Cache(layers=[DynamicLayer()])
    for n in (1, 2):
        model([3, 4], past=past)
        assert past.get_seq_length() == 2 * n


def test_where_it_cannot_be_put_back_the_caller_begins_anew():
    model, past = Model(fails=[1]), Cache(layers=[DynamicLayer()])
    past.offloading, past.update = True, lambda *_: None
    with pytest.raises(
        OffloadError, match=r"16.38 KB of expert slots were given back.*call generate\(\.\.\.\) again"
    ) as e:
        model([3, 4], past=past)
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError) and not isinstance(e.value, torch.OutOfMemoryError)
    assert model.forwards == 1 and model.runtime.slots == (4, 4)
    assert torch.equal(model([3, 4]), expected(0, [3, 4]))


def test_it_may_come_out_of_the_compiler():
    class Failed(RuntimeError):
        def __init__(self):
            self.inner_exception = torch.OutOfMemoryError("no")

    model = Model(fails=[1], error=Failed)
    assert torch.equal(model([3, 4]), expected(0, [3, 4])) and model.runtime.slots == (4, 4)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: CUDA_ERROR_OUT_OF_MEMORY",
    ],
)
def test_it_may_come_from_what_allocates_by_itself(words):
    model = Model(fails=[1], error=lambda: RuntimeError(words))
    assert torch.equal(model([3, 4]), expected(0, [3, 4])) and model.runtime.slots == (4, 4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, OffloadError])
@pytest.mark.parametrize("fails", [[1], [1, 2]])
def test_other_errors_are_not_ours(error, fails):
    model = Model(fails=fails, error=error)
    if len(fails) == 2:
        errors = iter([torch.OutOfMemoryError("first"), error("then")])
        model.error = lambda: next(errors)
    with pytest.raises(error):
        model([3, 4])
    assert model.runtime.slots == ((6, 6) if len(fails) == 1 else (4, 4))


def test_two_models_each_give_back_their_own():
    one, other = Model(fails=[1]), Model(fails=[2])
    for model in (one, other, one, other):
        assert torch.equal(model([3, 4]), expected(0, [3, 4]))
    assert one.runtime.slots == other.runtime.slots == (4, 4)


def test_recordings_are_freed_before_banks_shrink(monkeypatch):
    """One may have been interrupted in the middle, and all hold memory that the banks are to be made of."""
    from moe_offload.forward.out_of_memory import retry

    order, shrink = [], retry.shrink_banks
    monkeypatch.setattr(retry, "forget_recordings", lambda: order.append("forget"))
    monkeypatch.setattr(retry, "shrink_banks", lambda runtime: order.append("shrink") or shrink(runtime))
    model = Model(fails=[1])
    assert torch.equal(model([1, 2]), expected(0, [1, 2])) and order == ["forget", "shrink"]
