"""What people do with an optimised model: move, copy, pickle, load into, adapt. Each works, or says why not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from moe_offload import OffloadError
from moe_offload.apps.families.tiny import build
from tests.fakes.offloaded import IDS, QWEN, offloaded, resident, say
from tests.fakes.peft_of_transformers import need_peft_of_transformers


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    model = offloaded(layers=2)
    yield model
    model.moe_offload.close()


PARTS = {
    "model": lambda model: model,
    "base model": lambda model: model.model,
    "layer": lambda model: model.model.layers[0],
    "experts' parent": lambda model: model.model.layers[1].mlp,
    "experts": lambda model: model.model.layers[0].mlp.experts,
    "a module around it": lambda model: torch.nn.ModuleList([model]),
}
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)

MOVES = {
    "half": lambda part: part.half(),
    "to dtype": lambda part: part.to(torch.bfloat16),
    "to meta": lambda part: part.to("meta"),
    "share_memory": lambda part: part.share_memory(),
}


@every_part
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_no_part_with_experts_can_be_moved_or_converted(model, part, move):
    with pytest.raises(OffloadError, match=r"first, then call optimize\(\)"):
        move(part(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not any(p.is_meta for p in model.parameters())


@every_part
def test_what_changes_nothing_is_no_move(model, part):
    assert part(model).to("cpu") is not None and part(model).float() is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to move to")
def test_cuda_without_a_gpu(model):
    for move in (model.cuda, lambda: model.to("cuda"), lambda: model.to("cuda", torch.bfloat16)):
        with pytest.raises(OffloadError, match=r"(?i)move or convert.*(cuda|nvidia).*first, then call optimize\(\)"):
            move()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda part: torch.save(part, io.BytesIO()),
}


@every_part
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_no_part_with_experts_can_be_copied(model, part, duplicate):
    with pytest.raises(OffloadError, match=r"before optimize\(\)"):
        duplicate(part(model))


def test_a_shallow_copy_of_the_model_is_refused_and_one_of_a_layer_shares_its_experts(model):
    for part in (model, model.model.layers[0].mlp.experts):
        with pytest.raises(OffloadError, match=r"before optimize\(\)"):
            copy.copy(part)
    layer = model.model.layers[0]
    assert copy.copy(layer).mlp.experts is layer.mlp.experts


def test_a_dense_part_is_copied_and_pickled_as_ever(model):
    attention = model.model.layers[0].self_attn
    again = pickle.loads(pickle.dumps(copy.deepcopy(attention.q_proj)))
    assert torch.equal(again.weight, attention.q_proj.weight)


# Weights out of the model and into it.


def test_state_dicts_of_the_model_and_of_its_parts_have_the_real_weights(model):
    plain = build(QWEN, num_hidden_layers=2)
    for part in list(PARTS.values())[:-1]:
        want, found = part(plain).state_dict(), part(model).state_dict()
        assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in plain.state_dict().items())


@every_part
@pytest.mark.parametrize("strict", [True, False])
def test_experts_are_not_loaded_and_nothing_else_is_then(model, part, strict):
    before = {name: p.clone() for name, p in model.named_parameters() if "experts" not in name}
    state = {key: torch.zeros_like(tensor) for key, tensor in part(model).state_dict().items()}
    with pytest.raises(OffloadError, match=r"tensors of experts, such as .*gate_up_proj.*before optimize\(\)"):
        part(model).load_state_dict(state, strict=strict)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_dense_weights_are_loaded_and_count_at_once():
    plain, model = resident(layers=1), offloaded(layers=1)
    assert torch.equal(say(model), say(plain))
    other = {k: v for k, v in build(QWEN, seed=1, num_hidden_layers=1).state_dict().items() if "experts" not in k}
    for each in (plain, model):
        assert not each.load_state_dict(other, strict=False).unexpected_keys
    assert torch.equal(say(model), say(plain))
    model.moe_offload.close()


# Adapters. The wrapper calls model.forward, past the compiled call; its generate calls the model.


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False, **options}
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**config))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """What the resident model says without and with the adapter, its logits with it, and where that was saved."""
    without = say(resident(layers=2))
    plain = adapted(resident(layers=2))
    folder = tmp_path_factory.mktemp("adapter")
    plain.save_pretrained(folder)
    tokens = say(plain)
    assert not torch.equal(tokens, without)
    return without, tokens, plain(IDS).logits.detach(), folder


def test_an_adapter_added_before_the_first_forward(adapter, tmp_path):
    without, tokens, logits, _ = adapter
    model = offloaded(layers=2)
    wrapped = adapted(model)
    assert torch.equal(say(wrapped), tokens) and torch.equal(wrapped(IDS).logits, logits)
    assert model.moe_offload.stats().misses and model.moe_offload.graphs
    with wrapped.disable_adapter():
        assert torch.equal(say(wrapped), without)
    assert torch.equal(say(wrapped), tokens)

    merged = wrapped.merge_and_unload()
    assert merged is model and torch.equal(say(merged), say(adapted(resident(layers=2)).merge_and_unload()))
    merged.save_pretrained(tmp_path)
    state, saved = merged.state_dict(), type(merged).from_pretrained(tmp_path).state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in state)
    model.moe_offload.close()


def test_an_adapter_loaded_after_the_first_forward_and_taken_off_again(adapter):
    peft = pytest.importorskip("peft")
    without, tokens, logits, folder = adapter
    model = offloaded(layers=2)
    assert torch.equal(say(model), without)
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    assert torch.equal(say(wrapped), tokens) and torch.equal(wrapped(IDS).logits, logits)
    assert torch.equal(say(wrapped.unload()), without)
    model.moe_offload.close()


def test_an_adapter_by_transformers_own_method_and_only_it_is_saved(adapter, tmp_path, monkeypatch):
    from moe_offload.runtime.model import Runtime

    need_peft_of_transformers()
    _, tokens, _, folder = adapter
    model = offloaded(layers=2)
    model.load_adapter(str(folder))
    assert torch.equal(say(model), tokens)
    monkeypatch.setattr(Runtime, "read_stacked", lambda *_: pytest.fail("experts were read to save an adapter"))
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list(tmp_path.glob("model*.safetensors"))
    model.moe_offload.close()


EXPERTS = {"one": ["mlp.experts.gate_up_proj"], "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize(
    ("parameters", "first"),
    [(EXPERTS["one"], False), (EXPERTS["both"], True)],
    ids=["one, before the first forward", "both, after it"],
)
def test_adapters_of_experts_are_refused_by_every_call_and_leave_the_model_as_it_was(parameters, first):
    want, model = say(resident(layers=1)), offloaded(layers=1)
    if first:
        say(model)
    wrapped = adapted(model, target_modules=[], target_parameters=parameters)
    calls = [lambda: say(wrapped), lambda: wrapped(IDS), lambda: model(IDS), lambda: model.model(IDS)]
    for call in calls:
        with pytest.raises(OffloadError, match=r"Adapt dense layers only.*merge the adapter.*before optimize"):
            call()
    for safe in (False, True):  # peft's own words
        with pytest.raises((RuntimeError, ValueError), match=r"single memory location|NaNs detected"):
            wrapped.merge_and_unload(safe_merge=safe)
    wrapped.unload()
    assert torch.equal(say(model), want)
    model.moe_offload.close()


def test_modules_that_peft_would_copy_or_cannot_wrap_are_refused_at_once():
    model = offloaded(layers=1)
    with pytest.raises(OffloadError, match="cannot be copied"):
        adapted(model, modules_to_save=["experts"])
    with pytest.raises(ValueError, match="is not supported"):
        adapted(offloaded(layers=1), target_modules=["experts"])
