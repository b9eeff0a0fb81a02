"""Steps that go past Dynamo's guards: whatever changes between two of them, the result is that of the plain model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import StaticCache

from tests.fakes.offloaded import QWEN, SETTINGS, offload, resident

DEVICE = replace(SETTINGS, decide="device", poison=False, dynamic=None)
PROMPT, STEP = torch.arange(3, 15).view(1, -1), torch.tensor([[5]])


class Both:
    """The plain model and the offloaded one, each with a KV cache of its own, given the same at every step."""

    def __init__(self, family=QWEN, prepare=lambda model: None):
        torch._dynamo.reset()
        self.plain, model = resident(family, layers=2), resident(family, layers=2)
        for one in (self.plain, model):
            prepare(one)
        self.model = offload(model, 0.5, config=DEVICE, device_map="cpu", profile="off")
        self.caches = [StaticCache(config=one.config, max_cache_len=256) for one in (self.plain, self.model)]
        self.call(PROMPT)
        for _ in range(4):
            self.step()
        assert self.taken >= 1

    @property
    def taken(self):
        return self.model._compiled_call_impl.run.steps.taken

    def call(self, ids, **options):
        with torch.no_grad():
            want, got = (
                model(ids, past_key_values=cache, **options).logits
                for model, cache in zip((self.plain, self.model), self.caches, strict=True)
            )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # a traced step rounds otherwise than an eager one
        return got

    def step(self):
        return self.call(STEP)

    def change(self, what):
        for one in (self.plain, self.model):
            what(one)


@pytest.fixture(scope="module")
def shared():
    both = Both()
    yield both
    both.model.moe_offload.close()


@pytest.fixture
def both(shared):
    """Steady again, whatever the test before has changed."""
    for _ in range(4):
        before = shared.taken
        shared.step()
    assert shared.taken > before
    return shared


def taken_by(both, run):
    before = both.taken
    run()
    return both.taken - before


def test_a_steady_step_goes_past_dynamo_and_gives_the_same(both):
    assert taken_by(both, both.step) == 1


def attention(model):
    return model.model.layers[1].self_attn


CHANGES = {
    "a weight's values": lambda m: attention(m).q_proj.weight.data.mul_(1.5),
    "a weight's memory": lambda m: setattr(attention(m).q_proj.weight, "data", attention(m).q_proj.weight.data * 0.5),
    "another weight": lambda m: setattr(
        attention(m).k_proj, "weight", torch.nn.Parameter(attention(m).k_proj.weight * 0.7, requires_grad=False)
    ),
    "another module": lambda m: setattr(attention(m), "v_proj", attention(m).k_proj),
    "an attribute": lambda m: setattr(attention(m), "scaling", attention(m).scaling * 2),
    "an attribute of a norm": lambda m: setattr(m.model.norm, "variance_epsilon", 0.5),
    "a method": lambda m: m.model.norm.__dict__.__setitem__("forward", lambda x: x * 0.5),
    "a setting": lambda m: setattr(m.config, "output_hidden_states", not m.config.output_hidden_states),
    "a router": lambda m: m.model.layers[0].mlp.gate.weight.data.neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_between_two_steps_is_seen(both, change):
    before = both.step()
    both.change(CHANGES[change])
    if change == "a setting":
        assert taken_by(both, both.step) == 0
        both.change(CHANGES[change])
    else:
        assert not torch.allclose(both.step(), before, rtol=1e-2, atol=1e-3), "the change matters"


def test_parameters_are_not_looked_up_at_each_step(both):
    """Of 48 layers that would be most of what the code of a step does."""
    both.step()
    kept = both.model._compiled_call_impl.run.steps._kept[0]
    weights = [x for x in kept.run.__code__.co_consts if isinstance(x, torch.nn.Parameter)]
    assert {id(attention(both.model).k_proj.weight), id(both.model.lm_head.weight)} <= set(map(id, weights))
    caches = {id(x) for layer in both.caches[1].layers for x in vars(layer).values() if isinstance(x, torch.Tensor)}
    assert caches and caches.isdisjoint(map(id, kept.run.__code__.co_consts))


def test_a_hook_is_called_and_is_called_no_more_once_it_is_off(both):
    handles = []
    both.change(lambda m: handles.append(m.model.norm.register_forward_hook(lambda *args: args[-1] * 0.25)))
    assert taken_by(both, both.step) <= 0, "graphs are made anew"
    both.step()
    for handle in handles:
        handle.remove()
    both.step()
    both.step()


def test_a_weight_that_was_replaced_is_not_held(both):
    replaced = weakref.ref(attention(both.model).k_proj.weight)
    both.change(CHANGES["another weight"])
    for _ in range(4):
        both.step()
    gc.collect()
    assert replaced() is None


def test_modes_and_arguments_are_guarded_as_ever(both):
    assert taken_by(both, lambda: both.call(STEP, output_hidden_states=True)) == 0
    assert taken_by(both, lambda: both.call(STEP.to(torch.int32))) == 0
    assert taken_by(both, lambda: both.call(STEP, logits_to_keep=1)) == 0
    both.step()
    kept = both.model._compiled_call_impl.run.steps._kept[0]
    kwargs = {"past_key_values": both.caches[1]}
    with torch.no_grad(), both.model._compiled_call_impl.scope.entered():
        assert kept.holds((STEP,), kwargs, kept.hooks) and not kept.holds((STEP,), kwargs, kept.hooks + 1)
        assert not kept.holds((both.caches[1].layers[0].cumulative_length,), kwargs, kept.hooks)
        with torch.enable_grad():
            assert not kept.holds((STEP,), kwargs, kept.hooks)
        with torch.compiler.set_stance("force_eager"):
            assert not kept.holds((STEP,), kwargs, kept.hooks)


def test_another_cache_is_another_and_the_first_is_not_held(both):
    others = [StaticCache(config=one.config, max_cache_len=256) for one in (both.plain, both.model)]
    first, both.caches = both.caches, others
    assert taken_by(both, lambda: both.call(PROMPT)) == 0
    assert taken_by(both, both.step) == 0
    for _ in range(3):
        both.step()
    assert taken_by(both, both.step) == 1
    both.caches = first
    assert taken_by(both, both.step) == 1, "both are kept"


def test_what_is_kept_goes_with_its_graphs(both):
    steps = both.model._compiled_call_impl.run.steps
    both.model._compiled_call_impl.scope.renew()
    assert both.model._compiled_call_impl.run.steps is not steps
    torch._dynamo.reset()
    both.step()
    for _ in range(4):
        both.step()


class List(list):
    pass


class Dict(dict):
    pass


def read_containers(model):
    """Let a norm read what is in a list, and an attribute of a dictionary; and let the model keep what it gave last."""
    norm = model.model.norm
    norm.some, norm.named, own = List(), Dict(), type(norm).forward
    norm.named.scale = torch.ones(1)

    def forward(x):
        model.last = own(norm, x) * (0.5 if len(norm.some) else 1.0) * norm.named.scale
        return model.last

    norm.__dict__["forward"] = forward


def test_containers_with_attributes_are_left_to_dynamo_and_the_model_goes():
    """A version tells of the one half, and not of the other. What is a constant of code no search for garbage finds."""
    both = Both(prepare=read_containers)
    before = both.step()
    changes = [lambda norm: norm.some.append(1), lambda norm: setattr(norm.named, "scale", torch.full((1,), 3.0))]
    for change in changes:
        both.change(lambda m, change=change: change(m.model.norm))
        after = both.step()
        assert not torch.allclose(after, before, rtol=1e-2, atol=1e-3), "the change matters"
        before = after
    taken = both.taken
    for _ in range(4):
        both.step()
    assert both.taken > taken
    both.model.moe_offload.close()
    gone = weakref.ref(both.model)
    del both
    gc.collect()
    assert gone() is None


def test_layers_that_count_are_left_to_dynamo():
    """Those of a sliding window have a number that changes with each step; the other half and the model are held."""
    both = Both("gpt_oss")
    assert taken_by(both, lambda: [both.step() for _ in range(20)]) == 20
    kept = both.model._compiled_call_impl.run.steps._kept[0]
    assert (kept.steady_layers, kept.other_layers) == ((1,), (0,))
    both.change(CHANGES["a weight's memory"])
    both.step()
    layer = both.caches[1].layers[0]
    with torch.no_grad(), both.model._compiled_call_impl.scope.entered():
        assert kept.holds((STEP,), {"past_key_values": both.caches[1]}, kept.hooks)
        layer.keys = layer.values
        assert not kept.holds((STEP,), {"past_key_values": both.caches[1]}, kept.hooks)
    both.model.moe_offload.close()


def test_where_the_host_decides_every_step_is_guarded():
    model = offload(resident(layers=1), 0.5, config=SETTINGS, device_map="cpu", profile="off")
    cache = StaticCache(config=model.config, max_cache_len=256)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        for _ in range(4):
            model(STEP, past_key_values=cache)
    assert model._compiled_call_impl.run.steps.taken == 0
    model.moe_offload.close()


def test_a_step_whose_graph_breaks_is_guarded_as_ever(both):
    """What comes after the break is compiled too, and only Dynamo finds it. The last test of these models: what was
    compiled in parts stays so."""

    def halved(x):
        torch._dynamo.graph_break()
        return x * 0.5

    both.change(lambda m: m.model.norm.__dict__.__setitem__("forward", halved))
    assert taken_by(both, lambda: [both.step() for _ in range(5)]) <= 0
