"""Quantised experts on a GPU: plain transformers' logits as nearly as another order of sums allows, decided by the
device in recorded steps. That each code is the CPU's number, to the bit: `tests/runtime/kernels/test_packed.py`."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_offload import OffloadConfig
from moe_offload.apps.families.quantised.kinds import KINDS
from tests.fakes.offloaded import IDS
from tests.fakes.quantised_checkpoints import load, write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SETTINGS = OffloadConfig(experts_implementation="grouped_mm", compile="graph", kv_tokens=64, wave_rows=2, untested=True)
DEVICE, HOST = replace(SETTINGS, decide="device"), replace(SETTINGS, decide="host", policy="decayed_lfu")
PROMPT = 100  # tokens: more pairs than have a product each


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=["mxfp4", "fp8", "ct-int4"])
def checkpoint(request, tmp_path_factory):
    """Its folder, and the logits of plain transformers on the CPU."""
    needs = KINDS[request.param].needs
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    folder = write(request.param, tmp_path_factory.mktemp(request.param) / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    return folder, logits_of(plain, "cpu")


def logits_of(model, device):
    """Of a long prompt, and of tokens after a short one: one step each, the same whatever the model would say."""
    ids = torch.arange(3, 3 + PROMPT).view(1, -1).to(device)
    with torch.no_grad():
        found = [model(ids).logits[0].float().cpu()]
        cache = model(ids[:, :8], use_cache=True)
        for i in range(8, 20):
            cache = model(ids[:, i : i + 1], past_key_values=cache.past_key_values, use_cache=True)
            found.append(cache.logits[0].float().cpu())
    return torch.cat(found)


def offloaded(folder, settings, where="cpu", residency=0.5):
    return load(folder, residency, settings, "cuda:0", device_map={"": 0, "model.layers.*.mlp.experts": where})


@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_logits_are_near_those_of_plain_transformers(checkpoint, settings, where):
    folder, want = checkpoint
    with offloaded(folder, settings, where).moe_offload as handle:
        got = logits_of(handle.model, "cuda")
        stats = handle.stats()
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    assert stats.misses > 0 and (stats.by_device > 0) == (settings.decide == "device" and where == "cpu")


def test_recorded_steps_say_what_steps_say_that_are_not(checkpoint):
    folder, _ = checkpoint
    said = []
    for compile in ("graph", "inductor"):
        torch._dynamo.reset()
        with offloaded(folder, replace(DEVICE, compile=compile)).moe_offload as handle:
            made = handle.model.generate(
                IDS.cuda(), max_new_tokens=24, do_sample=False, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True, cache_implementation="static", disable_compile=True,
            )  # fmt: skip
            said.append(made)
            assert handle.stats().by_device >= 23 * len(handle.moe_layers)
    first, second = (made.logits[1].float().cpu() for made in said)  # the first that a step made
    assert (first - second).abs().max() < 0.05 * first.abs().max()
