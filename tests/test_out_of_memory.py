"""The device's allocator fails in the middle of a forward: fewer slots, and the same tokens; or an error that says why.

On a CPU nothing runs out; here whatever moves rows says so on cue, as the allocator would: `torch.OutOfMemoryError`.
"""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch

from moe_offload.families.tiny import build

from .offloaded import IDS, QWEN, SETTINGS, offload, resident

DEVICE = replace(SETTINGS, decide="device")
LAYERS = 2


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def offloaded(family=QWEN, residency=0.75, settings=SETTINGS, **options):
    model = build(family, num_hidden_layers=LAYERS, **options)
    where = "cpu" if settings.decide == "device" else None
    return offload(model, residency, config=settings, device_map=where)


def slots(model):
    return list(model.moe_offload._runtime.slots)


def floors(model):
    return [bank.top_k for bank in model.moe_offload.banks]


class Allocator:
    """Raises at calls number `at`, counted from 1 over all that go through it."""

    def __init__(self, *at):
        self.at, self.calls = set(at), 0

    def through(self, function):
        def called(*args, **kwargs):
            self.calls += 1
            if self.calls in self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return function(*args, **kwargs)

        return called


def fail(model, *at):
    """Rows of `model` meet an allocator that fails at those numbers."""
    allocator, runtime = Allocator(*at), model.moe_offload._runtime
    if runtime.deciding is not None:
        for cache in runtime.deciding.caches:
            known = cache.kernels
            cache.kernels = known._replace(gather=allocator.through(known.gather))
    runtime._transfer.wait = allocator.through(type(runtime._transfer).wait.__get__(runtime._transfer))
    return allocator


@pytest.mark.parametrize("settings", [SETTINGS, DEVICE], ids=["host", "device"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_are_the_same_wherever_memory_runs_out(kind, settings, caplog):
    want = say_with(resident(layers=LAYERS), kind)
    model = offloaded(settings=settings)
    allocator = fail(model)
    assert torch.equal(say_with(model, kind), want)
    calls = allocator.calls
    model.moe_offload.close()
    prefill = model.moe_offload.banks[0].num_experts
    for at in {1, prefill // 2, prefill + 2, calls - 3, calls}:
        torch._dynamo.reset()
        model = offloaded(settings=settings)
        before, old = slots(model), [weakref.ref(layer.slots.bytes) for layer in model.moe_offload._runtime.layers]
        allocator = fail(model, at)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "moe_offload"):
            assert torch.equal(say_with(model, kind), want), f"call {at}"
        assert allocator.calls > at
        assert slots(model) == [k + (n - k) // 2 for n, k in zip(before, floors(model), strict=True)] != before
        (said,) = [r.getMessage() for r in caplog.records if "ran out of memory" in r.getMessage()]
        assert "were given back" in said and "prefill_chunk_size" in said
        gc.collect()
        assert not any(bank() is not None for bank in old), "an old bank is still held"
        assert torch.equal(say_with(model, kind), want), "and so are those of the next request"
        model.moe_offload.close()


def say_with(model, kind):
    options = {"cache_implementation": "static"} if kind == "static" else {}
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
