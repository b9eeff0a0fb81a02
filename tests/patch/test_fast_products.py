"""compute="fast": near the exact tokens, hooks and copies as ever, and nothing of it left after close."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_offload import OffloadConfig
from moe_offload.patch import fast_products
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, build, is_experts, offload, say

pytest.importorskip("numba")
FAST = replace(SETTINGS, compute="fast")
SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}


def made():
    model = build(QWEN, **SIZES).bfloat16().requires_grad_(False)
    for module in filter(is_experts, model.modules()):
        module.config._experts_implementation = "grouped_mm"
    return model


@pytest.fixture
def model():
    model = offload(made(), config=FAST)
    yield model
    model.moe_offload.close()


@pytest.fixture
def products(monkeypatch):
    """How many rows each fast product had: of linear layers, of experts."""
    kernels, seen = fast_products._kernels(), {"linear": [], "experts": []}
    one, many = kernels.multiply_rows, kernels.multiply_grouped
    monkeypatch.setattr(kernels, "multiply_rows", lambda x, *rest: seen["linear"].append(len(x)) or one(x, *rest))
    spy = lambda x, *rest: seen["experts"].append(len(x)) or many(x, *rest)  # noqa: E731
    with torch.library._scoped_library("moe_offload", "IMPL") as library:
        library.impl(
            "fast_grouped_mm", lambda x, w, slots: spy(x, w.transpose(1, 2), slots), "CPU", allow_override=True
        )
        yield seen


def test_near_the_exact_logits_for_few_tokens_and_equal_for_more(products):
    plain, model = made(), offload(made(), config=FAST)
    for tokens in (1, 2, 4, 5, 12):
        seen = {kind: len(found) for kind, found in products.items()}
        want, got = plain(IDS[:, :tokens]).logits, model(IDS[:, :tokens]).logits
        few = tokens <= fast_products.FEW_TOKENS
        assert torch.allclose(got.float(), want.float(), atol=0.05, rtol=0.05) if few else torch.equal(got, want)
        asked = {kind: len(found) - seen[kind] for kind, found in products.items()}
        assert (asked["linear"] == 9 and asked["experts"] >= 4) if few else asked == {"linear": 0, "experts": 0}
    model.moe_offload.close()


def test_exact_is_the_default_and_has_no_fast_product(products):
    plain, model = made(), offload(made())
    assert OffloadConfig().compute == "exact"
    assert torch.equal(say(model), say(plain)) and products == {"linear": [], "experts": []}
    assert not any("forward" in vars(module) for module in model.modules())
    model.moe_offload.close()


def test_a_token_is_the_same_whatever_is_cached_and_with_any_number_of_threads():
    """Misses cut an event into waves, which must not show."""
    texts = []
    for residency, threads in ((0.0, 1), (1.0, 1), (0.5, 2)):
        torch.set_num_threads(threads)
        model = offload(made(), residency, config=FAST)
        texts.append(say(model))
        model.moe_offload.close()
    torch.set_num_threads(1)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_hooks_on_linear_layers_act(model):
    want = model(IDS[:, :1]).logits
    heard = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: heard.append(out.shape) or out * 2)
    assert torch.equal(model(IDS[:, :1]).logits, want * 2) and len(heard) == 1
    hook.remove()
    assert torch.equal(model(IDS[:, :1]).logits, want)


def test_weights_that_are_changed_count(model):
    x = torch.randn(1, 256).bfloat16()
    model.lm_head.weight.data.mul_(2)
    doubled = model.lm_head(x)
    model.lm_head.weight.data.div_(2)
    assert torch.equal(doubled, model.lm_head(x) * 2)


def test_an_adapter_wraps_and_keeps_working(model):
    from peft import LoraConfig, get_peft_model

    want = model(IDS[:, :1]).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["v_proj"], r=2))
    assert torch.equal(adapted(IDS[:, :1]).logits, want), "a fresh adapter adds nothing"
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    assert not torch.equal(adapted(IDS[:, :1]).logits, want)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_computes_with_its_own_weights(model, duplicate):
    x, head = torch.randn(2, 256).bfloat16(), model.lm_head
    other = duplicate(head)
    other.weight.data.zero_()
    assert not other(x).any() and head(x).any()


def test_what_is_more_than_a_plain_product_is_torchs(model, products):
    layer, x = model.lm_head, torch.randn(2, 256).bfloat16()
    products["linear"].clear()
    want = nn.functional.linear(x, layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), want)
    assert torch.equal(torch.vmap(layer)(x), want)
    wanting = x.clone().requires_grad_()
    layer(wanting).sum().backward()
    assert wanting.grad is not None
    assert torch.equal(layer(x.t().contiguous().t()), want)
    assert layer(x[:0]).shape == (0, layer.out_features)
    with pytest.raises(RuntimeError):
        layer(x.float())
    with pytest.raises(RuntimeError):
        layer(x[:, :128])
    assert products["linear"] == []
    assert layer(x[0]).shape == layer(x[:1])[0].shape and products["linear"] == [1, 1]


def test_a_forward_that_somebody_has_replaced_is_left_alone():
    model = made()
    own = lambda x: nn.functional.linear(x, model.lm_head.weight) + 1  # noqa: E731
    model.lm_head.forward = own
    offload(model, config=FAST)
    assert model.lm_head.forward is own and "forward" in vars(model.model.layers[0].self_attn.q_proj)
    later = lambda x: x  # noqa: E731
    model.model.layers[0].self_attn.q_proj.forward = later
    model.moe_offload.close()
    assert model.lm_head.forward is own and model.model.layers[0].self_attn.q_proj.forward is later


def test_close_restores(model):
    assert sum("forward" in vars(module) for module in model.modules()) == 9
    model.moe_offload.close()
    assert not any("forward" in vars(module) for module in model.modules())
    x = torch.randn(1, 256).bfloat16()
    assert torch.equal(model.lm_head(x), nn.functional.linear(x, model.lm_head.weight))


def test_what_is_saved_is_the_model(model, tmp_path):
    plain = made()
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype="auto").state_dict()
    assert again.keys() == plain.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.state_dict().items())


def test_without_numba_all_is_exact_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "moe_offload.runtime.kernels.few_rows", None)
    monkeypatch.setattr("moe_offload.runtime.kernels.few_rows", None, raising=False)
    monkeypatch.delattr("moe_offload.runtime.kernels.few_rows")
    fast_products._kernels.cache_clear()
    try:
        models = [offload(made(), config=FAST) for _ in range(2)]
        assert torch.equal(say(models[0]), say(made()))
        assert not any("forward" in vars(module) for module in models[0].modules())
        assert sum("Products are exact" in record.message for record in caplog.records) == 1
        for model in models:
            model.moe_offload.close()
    finally:
        fast_products._kernels.cache_clear()


def test_packed_leaves_a_model_that_is_not_quantised_exact():
    model = offload(made(), config=replace(FAST, compute="packed"))
    assert torch.equal(say(model), say(made()))
    model.moe_offload.close()
