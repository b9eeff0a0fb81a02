"""What every entry of `FORMS` promises: it finds its own models and no other's, and knows where each weight is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_offload.errors import OffloadError, UnsupportedModelError
from moe_offload.experts import FORMS, find_experts
from moe_offload.memory.stores.host import pack_row
from tests.fakes.stack_models import build as build_loops
from tests.fakes.stack_models import offload
from tests.fakes.tiny_checkpoints import build as build_tiny

#: A model of each form.
MODELS = {
    "interface": lambda: build_tiny("stacked"),
    "masked": lambda: build_loops("masked"),
    "modules": lambda: build_loops("hits"),
    "stacks": lambda: build_loops("biased"),
    "lists": lambda: build_loops("lists"),
}


def test_every_form_has_a_model():
    assert set(MODELS) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
class TestForm:
    def test_it_finds_its_model_and_no_other_does(self, form):
        model = MODELS[form]()
        found = {name: find(model) for name, find in FORMS.items()}
        assert [name for name, layers in found.items() if layers] == [form]
        assert {moe.form for moe in found[form]} == {form}

    def test_layers_are_numbered_in_the_order_of_the_model(self, form):
        model = MODELS[form]()
        layers = find_experts(model)
        names = [name for name, _ in model.named_modules()]
        assert [moe.index for moe in layers] == list(range(len(layers))) and len(layers) > 1
        assert [moe.name for moe in layers] == sorted((moe.name for moe in layers), key=names.index)
        assert all(model.get_submodule(moe.name) is moe.modules[0] for moe in layers)

    def test_places_are_the_parameters_of_the_state_dict(self, form):
        model = MODELS[form]()
        state = model.state_dict(keep_vars=True)
        for moe in find_experts(model):
            assert all(state[f"{moe.name}.{place.key}"] is place.tensor for place in moe.own_places)
            held = sum(place.tensor.nbytes for place in moe.own_places)
            assert held == moe.num_experts * sum(field.nbytes for field in moe.unpacked.fields)
            assert {id(t) for t in moe.tensors} == {id(p) for p in moe.modules[0].parameters()}

    def test_a_row_holds_what_the_model_has(self, form):
        model = MODELS[form]()
        for moe in find_experts(model):
            row = torch.zeros(moe.layout.row_bytes, dtype=torch.uint8)
            for e in range(moe.num_experts):
                pack_row(moe, e, row)
                for field in moe.layout.fields:
                    assert torch.equal(field.view_in(row), moe.expert(e)[field.name])

    def test_finding_changes_nothing(self, form):
        model = MODELS[form]()
        before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
        find_experts(model)
        after = model.state_dict(keep_vars=True)
        assert all(id(after[name]) == known and torch.equal(after[name], was) for name, (known, was) in before.items())

    def test_an_offloaded_model_is_refused(self, form):
        model = offload(MODELS[form]())
        with pytest.raises(OffloadError, match="already offloaded"):
            find_experts(model)
        model.moe_offload.close()


class Mlp(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.up = nn.Linear(size, size)

    def forward(self, x):
        return self.up(x)


class Holder(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class MoeDecoderLayer(Mlp):
    pass


class ExpertLayer(nn.Module):
    """A layer by its looks, whatever it is called."""

    def __init__(self):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    "model",
    [
        Holder(layers=nn.ModuleList([MoeDecoderLayer() for _ in range(4)])),
        Holder(experts=nn.ModuleList([MoeDecoderLayer() for _ in range(4)])),
        Holder(experts=nn.ModuleList([ExpertLayer() for _ in range(4)])),
        Holder(experts=nn.ModuleList([Holder(layers=nn.ModuleList([Mlp(), Mlp()])) for _ in range(3)])),
        Holder(experts=nn.ModuleList([Mlp(8), Mlp(16)])),
        Holder(experts=nn.ModuleList([Mlp()])),
        Holder(experts=nn.ModuleList([nn.Identity(), nn.Identity()])),
        Holder(blocks=nn.ModuleList([Mlp() for _ in range(4)])),
    ],
    ids=["layers", "layers called experts", "attention", "models", "unlike", "one", "no weights", "no name"],
)
def test_what_is_no_list_of_experts_is_not_taken_for_one(model):
    assert FORMS["modules"](model) == []


def test_members_without_weights_are_no_experts():
    moe, *_ = find_experts(build_loops("identities"))
    assert moe.num_experts == 7 and len(moe.modules[0]) == 9
    assert {place.key.partition(".")[0] for place in moe.own_places} == {"0", "2", "3", "4", "5", "6", "7"}


def test_a_list_that_layers_share_is_one_layer():
    assert len(find_experts(build_loops("tied"))) == 1


def test_the_floor_is_one_slot_where_experts_are_called():
    assert {moe.floor for moe in find_experts(build_loops())} == {1}
    assert {moe.floor for moe in find_experts(build_tiny("stacked"))} == {2}


def tie_one(model):
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second[3].w1.weight = first[3].w1.weight


def tie_outside(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(48, 32))
    model.model.layers[0].mlp.experts[2].w1.weight = model.lm_head.weight


def tie_inside(model):
    expert = model.model.layers[0].mlp.experts[0]
    for one in model.model.layers[0].mlp.experts:
        one.w3.weight = one.w1.weight
    assert expert.w3.weight is expert.w1.weight


def stride(model):
    weight = model.model.layers[0].mlp.experts[5].w2.weight
    model.model.layers[0].mlp.experts[5].w2.weight = nn.Parameter(weight.detach().t().contiguous().t())


def subclass(model):
    class Packed(nn.Parameter):
        pass

    for one in model.model.layers[0].mlp.experts:
        one.w2.weight = Packed(one.w2.weight.detach())


def buffers(model):
    for one in model.model.layers[0].mlp.experts:
        one.register_buffer("qweight", torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (tie_one, "expert 3 shares w1.weight with expert 3 of model.layers.0.mlp.experts"),
        (tie_outside, "lm_head.weight is tied to expert 2 of model.layers.0.mlp.experts"),
        (tie_inside, "same parameter twice"),
        (stride, "experts.5: its w2.weight is not contiguous"),
        (subclass, "is a Packed"),
        (buffers, r"keeps weights in buffers \(qweight\)"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(change, said):
    model = build_loops()
    change(model)
    with pytest.raises(UnsupportedModelError, match=said):
        find_experts(model)
