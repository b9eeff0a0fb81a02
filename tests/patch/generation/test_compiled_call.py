"""generate() asks for what runs its decode steps; the answer of an offloaded model keeps transformers' contract."""

from __future__ import annotations

import torch
from transformers import CompileConfig

from tests.fakes.offloaded import IDS, offloaded, resident


def test_generate_s_own_compiling_is_answered_and_said_to_be_ours(caplog):
    plain, model = resident(layers=1), offloaded(layers=1)
    on_any_device = CompileConfig(fullgraph=True, backend="aot_eager")
    on_any_device._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    want = plain.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options), want)
    assert not hasattr(model, "_compiled_call")  # on a CPU nobody has asked for it
    for _ in range(2):
        assert torch.equal(model.generate(IDS, compile_config=on_any_device, **options), want)
    assert model._compiled_call is model.get_compiled_call(on_any_device)
    assert model._compiled_call is model.get_compiled_call(None) and model._last_compile_config == on_any_device
    said = [r.getMessage() for r in caplog.records if "compile_config" in r.getMessage() and "moe_offload" in r.name]
    assert len(said) == 1 and "is not used: an offloaded model is compiled by moe_offload" in said[0]
    model.get_compiled_call(CompileConfig(dynamic=True))
    assert len([r for r in caplog.records if "is not used" in r.getMessage()]) == 2
    model.moe_offload.close()
