"""A whole model on a GPU: the resident model's tokens, no wait for the host while decoding, memory inside the budget.

python -m pytest -m gpu            everything that needs a GPU; benchmarks/gpu.py runs it with the measurements
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moe_offload
from moe_offload import OffloadConfig
from moe_offload.experts import find_experts
from moe_offload.families.tiny import build
from moe_offload.measure import costs, layer_shapes
from moe_offload.plan import budget_for

from ..offloaded import IDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
SETTINGS = OffloadConfig(experts_implementation="grouped_mm", compile="graph", kv_tokens=64, wave_rows=2, untested=True)
DEVICE, HOST = replace(SETTINGS, decide="device"), replace(SETTINGS, decide="host", policy="decayed_lfu")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def on_gpu(family, dtype=torch.float32):
    return build(family, num_hidden_layers=2).to("cuda", dtype).eval()


def offloaded(family, settings, residency=0.5, dtype=torch.float32, where="cpu"):
    model = on_gpu(family, dtype)
    banks = find_experts(model)
    budget = budget_for(residency, layer_shapes(banks), costs(model, banks, settings))
    rows = {"": 0, "model.layers.*.mlp.experts": where}
    return moe_offload.optimize(model, budget, device_map=rows, config=settings)


def say(model, n=24, **options):
    return model.generate(IDS.cuda(), max_new_tokens=n, do_sample=False, pad_token_id=0, **options).cpu()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids.cuda()).logits.float().cpu()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_tokens_are_those_of_the_resident_model(family, settings, where):
    if (where, settings.decide) == ("disk", "device"):
        pytest.skip("a GPU cannot read a disk by itself")
    plain = on_gpu(family)
    want = say(plain)
    model = offloaded(family, settings, where=where)
    got = say(model)
    assert torch.equal(got, want)
    # The kernels are not those of the resident model: sums in another order.
    torch.testing.assert_close(logits_of(model, want), logits_of(plain, want), rtol=1e-4, atol=1e-4)
    assert model.moe_offload.stats().misses > 0
    model.moe_offload.close()


def test_the_device_decides_as_the_host_does():
    seen = []
    for settings in (DEVICE, HOST):
        torch._dynamo.reset()
        model = offloaded("qwen3_moe", settings)
        say(model, n=200)
        stats = model.moe_offload.stats()
        seen.append((stats.hits, stats.misses, stats.tokens, model.moe_offload.profile().counts))
        model.moe_offload.close()
    assert seen[0] == seen[1]


def test_decoding_waits_for_nothing():
    """Any synchronising call in a decode step is an error here."""
    model = offloaded("qwen3_moe", DEVICE)
    step = torch.tensor([[5]], device="cuda")
    with torch.no_grad():
        past = model(IDS.cuda(), use_cache=True).past_key_values
        for _ in range(3):
            model(step, past_key_values=past, use_cache=True)  # traced, and the kernels compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                model(step, past_key_values=past, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    model.moe_offload.close()


def test_a_step_replayed_as_a_graph_says_the_same_over_200_steps():
    plain = on_gpu("qwen3_moe")
    want = say(plain, n=200, cache_implementation="static")
    model = offloaded("qwen3_moe", replace(DEVICE, compile="inductor"))
    assert torch.equal(say(model, n=200, cache_implementation="static"), want)
    model.moe_offload.close()


def test_memory_stays_inside_the_budget():
    model = on_gpu("qwen3_moe", torch.bfloat16)
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = offloaded("qwen3_moe", DEVICE, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    say(model, n=200)
    assert torch.cuda.max_memory_allocated() <= model.moe_offload.plan.budget_bytes
    model.moe_offload.close()


def test_two_models_on_one_gpu():
    one, other = offloaded("qwen3_moe", DEVICE), offloaded("gpt_oss", DEVICE)
    want = say(on_gpu("qwen3_moe")), say(on_gpu("gpt_oss"))
    for _ in range(2):
        assert torch.equal(say(one), want[0]) and torch.equal(say(other), want[1])
    one.moe_offload.close()
    other.moe_offload.close()


def test_what_was_pinned_is_given_back():
    from moe_offload.kernels import pinned

    for _ in range(3):
        model = offloaded("qwen3_moe", DEVICE)
        rows = model.moe_offload._runtime.layers[0].store.rows_EN(0)
        assert rows.is_pinned()
        model.moe_offload.close()
        assert not rows.is_pinned()
    fresh = torch.zeros(2, 4096, dtype=torch.uint8)
    assert pinned.pin([fresh]) and torch.equal(pinned.device_view(fresh, "cuda:0").cpu(), fresh)
    pinned.unpin([fresh])


def test_a_refused_pin_is_not_the_error_of_the_next_kernel():
    from moe_offload.kernels import pinned

    fresh = torch.zeros(2, 4096, dtype=torch.uint8)
    assert pinned.pin([fresh]) and not pinned.pin([fresh]), "what is registered is refused"
    assert int(torch.ones(1, device="cuda").add_(1)) == 2
    pinned.unpin([fresh])
    pinned.unpin([fresh])  # and what is not is not given back twice
    assert int(torch.ones(1, device="cuda").add_(1)) == 2


@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
def test_a_device_that_runs_out_in_a_forward(settings, caplog):
    """All that torch may hold is what it holds once the slots are there, and a little: no prompt fits beside them."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 64}
    ids = (torch.arange(512) % 97 + 3).view(1, -1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model = build("qwen3_moe", **sizes).to("cuda").eval()
    want = model.generate(ids.cuda(), **options).cpu()
    banks = find_experts(model)
    budget = budget_for(0.9, layer_shapes(banks), costs(model, banks, settings))
    rows = {"": 0, "model.layers.*.mlp.experts": "cpu"}
    model = moe_offload.optimize(model, budget, device_map=rows, config=settings)
    before = model.moe_offload.plan.slots
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    limit = torch.cuda.memory_reserved() + (8 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert torch.equal(model.generate(ids.cuda(), **options).cpu(), want)
        assert torch.cuda.max_memory_reserved() <= limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "ran out of memory" in caplog.text
    assert all(now < then for now, then in zip(model.moe_offload.plan.slots, before, strict=True))
    assert torch.cuda.max_memory_allocated() <= model.moe_offload.plan.budget_bytes
    assert torch.equal(model.generate(ids.cuda(), **options).cpu(), want)
    model.moe_offload.close()
