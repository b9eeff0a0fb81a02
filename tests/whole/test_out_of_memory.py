"""The device's allocator fails in the middle of a forward: fewer slots, and the same tokens; or an error that says why.

On a CPU nothing runs out; here whatever moves rows says so on cue, as the allocator would: `torch.OutOfMemoryError`.
"""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList

from moe_offload import OffloadError
from moe_offload.apps.families.tiny import build
from moe_offload.forward.out_of_memory.retry import Retry
from moe_offload.forward.out_of_memory.shrink import halve_spare_slots
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, resident

DEVICE = replace(SETTINGS, decide="device")
FETCHING = replace(SETTINGS, overlap=False)  # graphs that stream hold no number of slots; these do
LAYERS = 2


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(Retry, "_runs_out", lambda retry: True)


def offloaded(settings=SETTINGS):
    where = "cpu" if settings.decide == "device" else None
    return offload(build(QWEN, num_hidden_layers=LAYERS), 0.75, config=settings, device_map=where)


def slots(model):
    return list(model.moe_offload._runtime.slots)


class Allocator:
    """Fails at the calls that `fail_at` names, counted from the next on over all that go through it."""

    def __init__(self):
        self.calls, self.at = 0, set()

    def fail_at(self, *calls):
        self.at = {self.calls + n for n in calls}

    def fails_in_decode(self):
        """What `generate` is to be given for the fourth token to meet a failure."""
        scored = itertools.count(1)

        def processor(ids, scores):
            if next(scored) == 3:
                self.fail_at(1)
            return scores

        return {"logits_processor": LogitsProcessorList([processor])}

    def through(self, function):
        def called(*args, **kwargs):
            self.calls += 1
            if self.calls in self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return function(*args, **kwargs)

        return called


def allocator_of(model):
    """What every row of `model` goes through."""
    allocator, runtime = Allocator(), model.moe_offload._runtime
    for cache in runtime.device_caches.caches if runtime.device_caches else ():
        known = cache.kernels
        cache.kernels = known._replace(gather=allocator.through(known.gather))
    runtime._transfer.wait = allocator.through(runtime._transfer.wait)
    return allocator


def say_with(model, kind, n=6, **options):
    options |= {"cache_implementation": "static"} if kind == "static" else {}
    return model.generate(IDS, max_new_tokens=n, do_sample=False, pad_token_id=0, **options)


def warnings(caplog):
    return [message for message in caplog.messages if "ran out of memory" in message]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("dynamic", FETCHING, id="dynamic, host"),
        pytest.param("static", DEVICE, id="static, device"),
        pytest.param("dynamic", DEVICE, id="dynamic, device", marks=pytest.mark.long),
        pytest.param("static", SETTINGS, id="static, host", marks=pytest.mark.long),
    ],
)
def test_in_prefill_and_in_decode_and_the_tokens_are_the_same(kind, settings, caplog):
    want = say_with(resident(layers=LAYERS), kind)
    model = offloaded(settings=settings)
    allocator = allocator_of(model)
    before, floors = slots(model), [moe.top_k for moe in model.moe_offload.moe_layers]
    old = [weakref.ref(layer.slots.bytes) for layer in model.moe_offload._runtime.layers]
    summary = str(model.moe_offload)
    allocator.fail_at(
        model.moe_offload.moe_layers[0].num_experts
    )  # the first layer of the prompt is over, or nearly so
    with caplog.at_level(logging.WARNING, "moe_offload"):
        assert torch.equal(say_with(model, kind, **allocator.fails_in_decode()), want)
    assert len(warnings(caplog)) == 2, f"{allocator.calls} calls"
    assert all("were given back" in message for message in warnings(caplog))
    halves = halve_spare_slots(halve_spare_slots(before, floors), floors)
    assert slots(model) == halves != before
    gc.collect()
    assert not any(bank() is not None for bank in old), "an old bank is still held"

    handle = model.moe_offload
    assert list(handle.plan.slots) == [layer.slots for layer in handle.stats().layers] == halves
    assert list(handle.arrangement.slots) == halves and str(handle) != summary and handle.plan.unused_bytes > 0
    assert handle.stats().misses > 0 and handle.stats().graphs >= 4
    assert torch.equal(say_with(model, kind), want), "and so are those of the next request"
    handle.close()


class Cue(torch.nn.Module):
    """Eager code in the middle of a model, where its graph breaks: what ran before it has changed the cache."""

    def __init__(self, inner, allocator):
        super().__init__()
        self.inner, self.allocate = inner, allocator.through(lambda: None)

    @torch.compiler.disable
    def forward(self, *args, **kwargs):
        self.allocate()
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.long)])
def test_graphs_on_both_sides_of_a_break_are_made_anew_and_the_cache_is_cut(kind, caplog):
    """Their code is that of transformers, and Dynamo keeps what it made of it: no new call of ours makes it forget."""
    plain, model, allocator = resident(layers=LAYERS), offloaded(FETCHING), Allocator()
    for each, cue in ((plain, Allocator()), (model, allocator)):
        each.model.layers[1].input_layernorm = Cue(each.model.layers[1].input_layernorm, cue)
    want = say_with(plain, kind)
    allocator.fail_at(2, 5)  # a call for each forward: the first of decode, and one after the next
    with caplog.at_level(logging.WARNING, "moe_offload"):
        assert torch.equal(say_with(model, kind), want)
    assert len(warnings(caplog)) == 2
    # The op of last resort, in somebody else's code, finds the new bank too.
    with torch.no_grad():
        ours, theirs = (each.model(IDS).last_hidden_state for each in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    model.moe_offload.close()


@pytest.mark.long  # test_retry.py has it without a model
def test_what_cannot_be_put_back_is_for_the_caller_to_begin_anew():
    """Recurrent states are written over as they are read."""
    family = "qwen3_next"
    plain, model = (build(family) for _ in range(2))
    plain.set_experts_implementation("grouped_mm")
    want = say_with(plain, "dynamic")
    offload(model, 0.5)
    allocator = allocator_of(model)
    with pytest.raises(OffloadError, match=r"cannot be put back.*call generate\(\.\.\.\) again") as caught:
        say_with(model, "dynamic", **allocator.fails_in_decode())
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert torch.equal(say_with(model, "dynamic"), want)
    model.moe_offload.close()
