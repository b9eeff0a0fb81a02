"""Pinning that is refused, undone, interrupted, forked, against a runtime made of Python; tests/gpu has the real one.
Then the rows of a model: pinned as long as their store is open, and no longer."""

from __future__ import annotations

import logging
import os

import pytest
import torch

import moe_offload
from moe_offload import BudgetError, api
from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts
from moe_offload.memory.buffers import page_aligned
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.stores.open import open_stores
from moe_offload.memory.transfer import pinned
from tests.fakes.cudart import PAGE, Cudart, cuda  # noqa: F401
from tests.fakes.offloaded import QWEN, SETTINGS


def layers(n=3, experts=5):
    return {i: page_aligned(experts * PAGE).view(experts, PAGE) for i in range(n)}


def test_all_of_it(cuda):  # noqa: F811
    rows = layers()
    assert pinned.pin_layers(rows, "cuda:0") == {0, 1, 2} and sum(cuda.registered.values()) == 3 * 5 * PAGE
    assert all(nbytes <= 2 * PAGE for nbytes in cuda.registered.values())
    pinned.unpin_layers(rows, "cuda:0")
    assert cuda.registered == {} and cuda.error == 0


def test_refused_in_the_middle(cuda, caplog):  # noqa: F811
    cuda.most = 7 * PAGE  # within the second layer
    rows = layers(2)
    with caplog.at_level(logging.WARNING, "moe_offload"):
        assert pinned.pin_layers(rows, "cuda:0") == {0}
    assert sum(cuda.registered.values()) == 7 * PAGE and cuda.error == 0, "or the next kernel would report it"
    pinned.unpin_layers(rows, "cuda:0")
    assert cuda.registered == {} and cuda.error == 0
    (said,) = caplog.messages
    assert "1 of 2 layers" in said and "out of memory" in said and "ulimit -l" in said


@pytest.mark.parametrize("elsewhere", [None, 1])
def test_rows_that_the_device_sees_elsewhere_are_the_hosts(elsewhere, cuda, monkeypatch, caplog):  # noqa: F811
    """A kernel would read at the host's address, which there is none of its own: an error that ends the process."""
    rows = layers(2)
    first = rows[0].data_ptr()
    seen = pinned.device_address
    monkeypatch.setattr(pinned, "device_address", lambda address: elsewhere if address == first else seen(address))
    assert pinned.pin_layers(rows, "cuda:0") == {1}
    assert "1 of 2 layers" in caplog.text and "other addresses" in caplog.text
    pinned.unpin_layers(rows, "cuda:0")
    assert cuda.registered == {}


def test_without_a_driver_no_address_is_known():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert pinned.device_address(4096) is None


def test_what_was_unpinned_in_part_can_be_unpinned(cuda):  # noqa: F811
    """Ctrl-C came between two pieces, and `close` is called again."""
    rows = layers(1)
    pinned.pin_layers(rows, "cuda:0")
    cuda.cudaHostUnregister(rows[0].data_ptr())
    pinned.unpin_layers(rows, "cuda:0")
    assert cuda.registered == {} and cuda.error == 0


@pytest.mark.parametrize("verb", [pinned._register, pinned.unpin_rows])
def test_an_error_is_cleared_by_a_launch_that_meets_it(verb, monkeypatch):
    launches = []

    def launch(*_, **options):
        launches.append(options)
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(most=0))
    monkeypatch.setattr(torch, "full", launch)
    monkeypatch.setattr(pinned, "_process", os.getpid())
    assert verb(torch.empty(2, 4096, dtype=torch.uint8)) in (None, "out of memory")
    assert launches == [{"device": "cuda"}]


def test_what_torch_calls_of_the_runtime_is_there():
    bound = getattr(torch._C, "_cudart", None)
    if bound is None:
        pytest.skip("this torch was built without CUDA")
    assert all(hasattr(bound, name) for name in vars(Cudart) if name.startswith("cuda"))


# The rows of a model.


@pytest.fixture
def model():
    return build(QWEN, num_hidden_layers=3)


def stores_of(model):
    return open_stores(find_experts(model), ["host"] * 3, SETTINGS, "cuda:0")


def test_rows_stay_pinned_until_their_store_is_closed(cuda, model):  # noqa: F811
    (store,) = set(stores_of(model))
    assert store.pinned == {0, 1, 2} and cuda.registered
    store.close()
    store.close()
    assert cuda.registered == {}


def test_rows_of_which_some_are_pinned_are_unpinned_all_the_same(cuda, model):  # noqa: F811
    cuda.most = 20 * PAGE
    (store,) = set(stores_of(model))
    assert len(store.pinned) < 3 and cuda.registered
    store.close()
    assert cuda.registered == {} and cuda.error == 0


def test_an_interrupt_between_two_layers_leaves_nothing_pinned(cuda, model):  # noqa: F811
    cuda.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        stores_of(model)
    assert cuda.registered == {}


@pytest.mark.parametrize("step", ["build_runtime", "attach_runtime"])
def test_stores_are_closed_where_the_model_cannot_be_built_on_them(step, model, monkeypatch):
    closed = []
    monkeypatch.setattr(HostStore, "close", lambda self: closed.append(self))

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no room for slots")

    monkeypatch.setattr(api, step, fail)
    with pytest.raises(torch.OutOfMemoryError):
        moe_offload.optimize(model, "1GB", config=SETTINGS, device_map="cpu")
    assert len(closed) == 1


def test_slots_that_do_not_fit_are_a_budget_that_does_not(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moe_offload.runtime.assemble.allocate_unfilled", full)
    with pytest.raises(BudgetError, match=r"cpu has no room for .* of expert slots.*smaller budget"):
        moe_offload.optimize(model, "1GB", config=SETTINGS, device_map="cpu")
