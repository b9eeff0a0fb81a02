"""A prompt on a GPU: the resident model's logits, one wait a layer, memory inside the budget."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from tests.gpu.test_gpu import DEVICE, FAMILIES, HOST, logits_of, offloaded, on_gpu, say

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPT = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(0))
SCRATCH = {"wave_rows": 4}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
def test_logits_are_those_of_the_resident_model(family, settings):
    plain = on_gpu(family)
    model = offloaded(family, replace(settings, **SCRATCH), residency=0.25)
    for ids in (PROMPT, PROMPT.flip(1), PROMPT[:, :40]):
        torch.testing.assert_close(logits_of(model, ids), logits_of(plain, ids), rtol=1e-4, atol=1e-4)
    assert model.moe_offload.stats().misses > 0
    model.moe_offload.close()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_every_row_is_read_once_and_what_is_resident_never(where):
    model = offloaded("qwen3_moe", replace(HOST, **SCRATCH), residency=0.25, where=where)
    say(model)
    layers = model.moe_offload._runtime.layers
    most = [layer.counters.misses + layer.moe.num_experts - len(layer.cache.resident()) for layer in layers]
    logits_of(model, PROMPT)
    for layer, misses in zip(layers, most, strict=True):
        assert 0 < layer.counters.misses <= misses and len(layer.cache.resident()) == layer.cache.slots
    model.moe_offload.close()


@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
def test_the_host_waits_once_a_layer(settings):
    def waits(model):
        logits = model(ids).logits  # traced, and the kernels compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                logits = model(ids).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert logits.isfinite().all()
        return sum("synchronizing CUDA operation" in str(one.message) for one in seen)

    ids = PROMPT.cuda()
    with torch.no_grad():
        own = waits(on_gpu("qwen3_moe"))
        model = offloaded("qwen3_moe", replace(settings, **SCRATCH), residency=0.25)
        assert waits(model) <= own + len(model.moe_offload._runtime.layers)
    model.moe_offload.close()


def test_memory_stays_inside_the_budget():
    model = offloaded("qwen3_moe", replace(DEVICE, **SCRATCH), residency=0.25, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for ids in (PROMPT, PROMPT.flip(1)):
        logits_of(model, ids)
    assert torch.cuda.max_memory_allocated() <= model.moe_offload.plan.budget_bytes
    model.moe_offload.close()
