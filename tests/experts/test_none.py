"""A refusal names the module that really holds the experts, and the form that is not supported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_offload.errors import UnsupportedModelError
from moe_offload.experts import find_experts


class MoeStatics(nn.Module):
    """What balances the load of E experts: a bias [1, E], and no expert."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 8))


class MoeRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 16))


class Experts(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def lists(count=8):
    return nn.ParameterList([nn.Parameter(torch.zeros(4, 8)) for _ in range(count)])


class Model(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.config = type("Config", (), {"num_experts": 8})()
        self.moe_statics, self.router = MoeStatics(), MoeRouter()
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"calculator": Experts(weight_gate=lists(), weight_up=lists(4))},
            r"calculator \(Experts\) .*lists of parameters that are not alike",
        ),
        ({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 8)])}, r"experts \(ModuleList\) .*not alike"),
        ({"experts": nn.ModuleList([Quantised() for _ in range(8)])}, r"experts \(ModuleList\) .*in buffers"),
        ({"mixer": Experts(w1=nn.Parameter(torch.zeros(8 * 6, 4)))}, r"mixer \(Experts\) stacks its experts \(w1\)"),
        ({"mixer": Experts(a=nn.Embedding(8, 4), b=nn.Embedding(8, 4))}, r"mixer \(Experts\) .*rows of nn.Embedding"),
        ({}, "has no routed experts"),
    ],
    ids=["parameter lists", "unlike", "buffers", "stack", "embeddings", "none"],
)
def test_the_module_that_holds_the_experts_is_named(parts, said):
    with pytest.raises(UnsupportedModelError, match=said):
        find_experts(Model(**parts))
