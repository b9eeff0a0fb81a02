"""What eager code looks at in every call acts on an offloaded model as on the plain one, whenever it was changed."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from moe_offload.apps.families.tiny import build
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, offloaded, resident, say


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pair():
    """The plain model and the offloaded one, called before anything is changed."""
    with called_pair(SETTINGS) as models:
        yield models


@contextlib.contextmanager
def called_pair(settings):
    models = resident(layers=2), offloaded(layers=2, config=settings)
    for model in models:
        logits(model)
    yield models
    models[1].moe_offload.close()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


MODULES = {
    "model": lambda m: m,
    "base model": lambda m: m.model,
    "layer": lambda m: m.model.layers[1],
    "block": lambda m: m.model.layers[1].mlp,
    "router": lambda m: m.model.layers[1].mlp.gate,
    "experts": lambda m: m.model.layers[1].mlp.experts,
    "activation": lambda m: m.model.layers[1].mlp.experts.act_fn,
    "linear": lambda m: m.model.layers[0].self_attn.q_proj,
    "head": lambda m: m.lm_head,
}


def scaled(x, by):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x * by
    if isinstance(x, tuple):
        return tuple(scaled(one, by) for one in x)
    if isinstance(x, dict):
        x["last_hidden_state" if "last_hidden_state" in x else "logits"] *= by
    return x


def hook(module, args, out):
    return scaled(out, 1.5)


def pre_hook(module, args, kwargs):
    return scaled(args, 0.5), {k: scaled(v, 0.5) if k == "hidden_states" else v for k, v in kwargs.items()}


@pytest.mark.parametrize("where", MODULES.values(), ids=MODULES)
def test_hooks_put_on_and_taken_off_later(pair, where):
    plain, model = pair
    without = logits(plain)
    assert torch.equal(logits(model), without)
    for _ in range(2):
        handles = [where(each).register_forward_hook(hook) for each in pair]
        want = logits(plain)
        assert not torch.equal(want, without) and torch.equal(logits(model), want)
        for handle in handles:
            handle.remove()
        assert torch.equal(logits(model), without)
    handles = [where(each).register_forward_pre_hook(pre_hook, with_kwargs=True) for each in pair]
    assert torch.equal(logits(model), logits(plain))
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), without)


def test_global_hooks(pair):
    plain, model = pair
    without, seen = logits(plain), []
    for register in (
        lambda: register_module_forward_hook(
            lambda m, a, out: scaled(out, 1.01) if type(m) is torch.nn.Linear else out
        ),
        lambda: register_module_forward_pre_hook(lambda m, args: seen.append(type(m).__name__)),
    ):
        seen.clear()
        handle = register()
        want, names = logits(plain), list(seen)
        seen.clear()
        assert torch.equal(logits(model), want) and sorted(seen) == sorted(names)
        handle.remove()
        assert torch.equal(logits(model), without)


def set_and_put_back(owner, name, value):
    before = vars(owner).get(name, owner)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if before is owner else setattr(owner, name, before)


def replace_forward(m):
    one = m.model.layers[1].mlp
    return set_and_put_back(one, "forward", lambda x: type(one).forward(one, x) * 2)


def replace_experts_forward(m):
    one = m.model.layers[1].mlp.experts
    return set_and_put_back(one, "forward", lambda *args: type(one).forward(one, *args) * 2)


def replace_gate(m):
    block, other = m.model.layers[1].mlp, copy.deepcopy(m.model.layers[1].mlp.gate)
    with torch.no_grad():
        other.weight.mul_(-1)
    before, block.gate = block.gate, other
    return lambda: setattr(block, "gate", before)


def replace_activation(m):
    experts = m.model.layers[1].mlp.experts
    before, experts.act_fn = experts.act_fn, torch.nn.GELU()
    return lambda: setattr(experts, "act_fn", before)


def replace_gating(m):
    experts = m.model.layers[1].mlp.experts
    return set_and_put_back(experts, "_apply_gate", lambda x: x.chunk(2, dim=-1)[0])


def fewer_experts(m):
    return set_and_put_back(m.model.layers[1].mlp.gate, "top_k", 1)


def other_weights(m):
    head = m.lm_head
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.mul_(3)
    return lambda: head.weight.data.copy_(before)


CHANGES = [replace_forward, replace_experts_forward, replace_gate, replace_activation, replace_gating, fewer_experts]
CHANGES += [other_weights]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_parts_and_attributes_replaced_later(pair, change):
    plain, model = pair
    without = logits(plain)
    undo = [change(each) for each in pair]
    want, got = logits(plain), logits(model)
    for each in undo:
        each()
    assert not torch.equal(want, without) and torch.equal(got, want)
    assert torch.equal(logits(model), without)


class Doubles(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.nn.functional.silu else out


class DefaultDtype:
    def __enter__(self):
        torch.set_default_dtype(torch.bfloat16)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


class Deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


class Precision:
    def __enter__(self):
        torch.set_float32_matmul_precision("medium")

    def __exit__(self, *_):
        torch.set_float32_matmul_precision("highest")


class Threads:
    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(2 if self.before == 1 else 1)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "default dtype": DefaultDtype,
    "deterministic": Deterministic,
    "matmul precision": Precision,
    "threads": Threads,
    "function mode": Doubles,
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "default device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_state_of_the_process(pair, state):
    plain, model = pair
    without = logits(plain)
    for _ in range(2):
        with torch.no_grad(), state():
            want, got = plain(IDS).logits, model(IDS).logits
        assert torch.equal(got, want)
        assert torch.equal(logits(model), without)


def test_dropout_of_one_part_in_training():
    """The same random numbers are drawn in the same order: dropout is of the dense part."""
    plain = resident(layers=2, attention_dropout=0.5)
    model = offload(build(QWEN, num_hidden_layers=2, attention_dropout=0.5))
    for each in (plain, model):
        logits(each)
        each.model.layers[0].self_attn.train()
    found = []
    for each in (plain, model):
        torch.manual_seed(3)
        found.append(logits(each))
    assert torch.equal(*found)
    for each in (plain, model):
        each.eval()
    assert torch.equal(logits(plain), logits(model)) and not torch.equal(logits(plain), found[0])
    model.moe_offload.close()


def test_the_same_where_the_whole_call_is_one_graph():
    with called_pair(replace(SETTINGS, fullgraph=True)) as pair:
        test_hooks_put_on_and_taken_off_later(pair, MODULES["layer"])
        test_parts_and_attributes_replaced_later(pair, replace_gate)


# The user's configuration is the user's.


def test_other_models_are_made_from_the_configuration():
    plain, model = resident(layers=1), offloaded(layers=1)
    assert model.config._experts_implementation == "grouped_mm"
    for config in (model.config, copy.deepcopy(model.config), copy.deepcopy(model.model.layers[0].mlp.experts.config)):
        other = type(model)(config).eval()
        other.load_state_dict(plain.state_dict())
        assert torch.equal(logits(other), logits(plain))
    assert torch.equal(say(model), say(plain))
    assert logits(offloaded(layers=1)) is not None
    model.moe_offload.close()


def test_a_field_of_the_configuration_is_one_field():
    model = offloaded(layers=1)
    experts = model.model.layers[0].mlp.experts
    model.config.hidden_act = "gelu"
    assert experts.config.hidden_act == "gelu" and isinstance(experts.config, type(model.config))
    assert experts.config.to_dict() == model.config.to_dict()
    model.moe_offload.close()
