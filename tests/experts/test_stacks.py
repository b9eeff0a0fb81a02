"""Which modules stack experts that their code reads by a number, how many there are, and what one of them has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_offload.errors import UnsupportedModelError
from moe_offload.experts import FORMS, find_experts
from moe_offload.memory.stores.host import pack_row
from tests.fakes.stack_models import build


class Holder(nn.Module):
    def __init__(self, count=None, **weights):
        super().__init__()
        if count is not None:
            self.num_experts = count
        for name, shape in weights.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x, ids):
        return x


class TinyExperts(Holder):
    pass


def model_of(**children):
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def test_experts_in_one_matrix_are_taken_apart():
    (moe, *_) = find_experts(build("joined"))
    assert (moe.name, moe.num_experts, moe.form) == ("model.layers.0.mlp.experts.mlp", 8, "stacks")
    assert {field.name: field.shape for field in moe.layout.fields} == dict.fromkeys(("w1", "v1", "w2"), (48, 32))
    assert torch.equal(moe.expert(5)["v1"], moe.modules[0].v1[5 * 48 : 6 * 48])


def test_stacks_of_different_lengths_are_those_of_experts_without_weights():
    (moe, *_) = find_experts(build("stack_identities"))
    assert moe.num_experts == 8
    assert set(moe.expert(5)) == {"gate_up_proj", "down_proj"} and set(moe.expert(6)) == {"gate_up_proj"}
    row = torch.zeros(moe.layout.row_bytes, dtype=torch.uint8)
    pack_row(moe, 6, row)
    assert not moe.layout.fields[1].view_in(row).any()


def test_each_module_that_holds_stacks_is_a_layer():
    names = [moe.name for moe in find_experts(build("parallel"))]
    assert names == [f"model.layers.{i}.mlp.experts.{side}_experts" for i in (0, 1) for side in ("input", "output")]


def test_tied_stacks_are_one_layer():
    shared = TinyExperts(up=(4, 3, 2))
    (moe,) = FORMS["stacks"](model_of(one=model_of(experts=shared), two=model_of(experts=TinyExperts(up=(4, 3, 2)))))[
        :1
    ]
    assert moe.names == ("one.experts",)
    other = TinyExperts()
    other.up = shared.up
    (moe,) = FORMS["stacks"](model_of(one=model_of(experts=shared), two=model_of(experts=other)))
    assert moe.names == ("one.experts", "two.experts")


@pytest.mark.parametrize(
    "model",
    [
        model_of(shared_experts=nn.Linear(4, 4)),
        model_of(mlp=Holder(up=(4, 3, 2))),
        model_of(experts=TinyExperts(up=(1, 3, 2))),
        model_of(experts=TinyExperts(weight=(4, 3))),
        model_of(experts=TinyExperts(count=4, weight=(4, 3))),
        model_of(experts=TinyExperts(count=4, weight=(10, 3))),
        model_of(experts=TinyExperts(scale=(4,))),
    ],
    ids=["linear", "no name", "one", "no count", "a router", "no whole experts", "numbers"],
)
def test_what_stacks_no_experts_is_not_taken_for_it(model):
    assert not any(find(model) for find in FORMS.values())


def test_a_stack_that_is_no_ordinary_parameter_is_refused_by_name():
    experts = TinyExperts()
    experts.up = nn.Parameter(torch.randn(4, 3, 2).transpose(1, 2))
    with pytest.raises(UnsupportedModelError, match=r"^experts: its up is not contiguous"):
        find_experts(model_of(experts=experts))


def test_lists_of_experts_that_differ_are_refused_by_name():
    experts = TinyExperts()
    experts.up = nn.ParameterList([nn.Parameter(torch.randn(n, 2)) for n in (3, 3, 4)])
    with pytest.raises(UnsupportedModelError, match=r"^experts: its experts differ in up"):
        find_experts(model_of(experts=experts))
