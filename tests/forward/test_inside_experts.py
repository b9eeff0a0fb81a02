"""What a user puts into an experts module is exact or refused: experts run for a few tokens at a time, so code that
mixes tokens would see a part of what it sees in the plain model, and give other tokens without a word."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_offload import OffloadError, UnsupportedModelError
from tests.fakes.offloaded import offloaded, resident

PROMPTS = [torch.tensor([[5, 9]]), torch.tensor([[5, 9, 2, 4, 7]])]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pair():
    models = resident(layers=2), offloaded(layers=2)
    yield models
    models[1].moe_offload.close()


def experts_of(model):
    return model.model.layers[0].mlp.experts


def put_back(owner, name, value):
    """Set an attribute; returns what sets it back."""
    known, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if known or name in owner._modules else delattr(owner, name)


#: Of the output of an activation [P, I]: each mixes pairs, or counts them.
MIXES = {
    "mean": lambda y: y - y.mean(0),
    "mean of all": lambda y: y - y.mean(),
    "sum": lambda y: y + y.sum(dim=0, keepdim=True),
    "flip": lambda y: y.flip(0),
    "roll": lambda y: y.roll(1, 0),
    "count": lambda y: y * y.shape[0],
    "len": lambda y: y + len(y),
    "numel": lambda y: y / y.numel(),
    "first": lambda y: y + y[:1],
    "last": lambda y: y - y[-1],
    "outer": lambda y: (y.unsqueeze(1) * y)[:, 0],
    "sort": lambda y: y.sort(0).values,
    "cumsum": lambda y: y.cumsum(0),
    "softmax": lambda y: y.softmax(0),
    "transposed": lambda y: y.t().softmax(-1).t().contiguous(),
    "matmul": lambda y: (y @ y.t()) @ y,
    "chunks": lambda y: torch.cat(y.split(1)[::-1]) if len(y) < 3 else y * y.max(),
    "by place": lambda y: y * torch.arange(y.shape[0])[:, None],
    "column": lambda y: y * y[:, 0][..., :1],
    "norm": lambda y: y / y.norm(),
    "batch norm": lambda y: nn.functional.batch_norm(y, None, None, training=True),
    "dropout": lambda y: nn.functional.dropout(y, 0.5, training=True),
    "noise": lambda y: y + torch.rand_like(y),
    "max by numpy": lambda y: y * float(y.detach().numpy().max()),
    "printed": lambda y: y * float(y.amax().item()),
}
#: Each keeps them apart.
APART = {
    "scaled": lambda y: y * 1.5 + 0.25,
    "clamped": lambda y: y.clamp(max=0.01),
    "relu": torch.relu,
    "gated": lambda y: y * torch.sigmoid(y),
}


class Mixing(nn.SiLU):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x):
        return self.mix(super().forward(x))


def hook(experts, mix):
    return experts.act_fn.register_forward_hook(lambda m, args, out: mix(out)).remove


def pre_hook(experts, mix):
    return experts.act_fn.register_forward_pre_hook(lambda m, args: (mix(args[0]),)).remove


def global_hook(experts, mix):
    act = experts.act_fn
    return register_module_forward_hook(lambda m, args, out: mix(out) if m is act else None).remove


def global_pre_hook(experts, mix):
    act = experts.act_fn
    return register_module_forward_pre_hook(lambda m, args: (mix(args[0]),) if m is act else None).remove


def other_module(experts, mix):
    return put_back(experts, "act_fn", Mixing(mix))


def other_function(experts, mix):
    """Not a module: `act_fn` is a submodule, so its entry goes first."""
    before = experts._modules.pop("act_fn")
    experts.__dict__["act_fn"] = lambda x: mix(nn.functional.silu(x))

    def undo():
        del experts.__dict__["act_fn"]
        experts.act_fn = before

    return undo


def other_forward_of_the_activation(experts, mix):
    act = experts.act_fn
    act.forward = lambda x: mix(type(act).forward(act, x))
    return lambda: delattr(act, "forward")


def other_gating(experts, mix):
    experts._apply_gate = lambda x: mix(type(experts)._apply_gate(experts, x))
    return lambda: delattr(experts, "_apply_gate")


def subclass(experts, mix):
    own = type(experts)
    experts.__class__ = type("Mine", (own,), {"_apply_gate": lambda self, x: mix(own._apply_gate(self, x))})
    return lambda: setattr(experts, "__class__", own)


def patched_class(experts, mix):
    own, before = type(experts), type(experts)._apply_gate
    own._apply_gate = lambda self, x: mix(before(self, x))
    return lambda: setattr(own, "_apply_gate", before)


WAYS = [hook, pre_hook, global_hook, global_pre_hook, other_module, other_function, other_forward_of_the_activation]
WAYS += [other_gating, subclass, patched_class]


def logits(model, ids):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(ids).logits


def exact_or_refused(pair, way, mix, without_trace=contextlib.nullcontext):
    """How many of the prompts were exact."""
    plain, model = pair
    exact = 0
    for ids in PROMPTS:
        before = logits(plain, ids)
        undo = [way(experts_of(each), mix) for each in (pair if way is not patched_class else pair[:1])]
        try:
            want = logits(plain, ids)
            with without_trace():
                got = logits(model, ids)
        except OffloadError as error:
            assert isinstance(error, UnsupportedModelError) and "at a time" in str(error), error
        else:
            assert torch.equal(got, want)
            exact += 1
        finally:
            for one in undo:
                one()
        assert torch.equal(logits(model, ids), before)
    return exact


@pytest.mark.parametrize("way", WAYS)
def test_what_mixes_tokens_is_refused_or_exact(pair, way):
    for mix in (MIXES["mean"], MIXES["max by numpy"]):
        exact_or_refused(pair, way, mix)


def test_the_true_cause_is_named(pair):
    model = pair[1]
    kept = []
    handle = experts_of(model).act_fn.register_forward_hook(lambda m, args, out: kept.append(out))
    with pytest.raises(UnsupportedModelError, match=r"there is a hook on its act_fn\. .* keep nothing"):
        logits(model, PROMPTS[0])
    handle.remove()
    logits(model, PROMPTS[0])


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_each_way_to_mix_tokens_is_refused_or_exact(pair, mix):
    exact_or_refused(pair, hook, mix)


@pytest.mark.parametrize("way", WAYS)
def test_what_keeps_tokens_apart_is_exact(pair, way):
    for mix in APART.values() if way is hook else [APART["scaled"]]:
        assert exact_or_refused(pair, way, mix) == len(PROMPTS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mix", [MIXES["mean"], APART["scaled"]], ids=["mixes", "apart"])
def test_without_a_trace_nothing_of_another_s_runs_in_pieces(pair, way, mix):
    exact_or_refused(pair, way, mix, lambda: torch.compiler.set_stance("force_eager"))


class Changes(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * float(out.detach().numpy().max()) if func is nn.functional.silu else out


class ChangesKernels(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.ops.aten.silu.default else out


@pytest.mark.parametrize("mode", [Changes, ChangesKernels])
def test_a_mode_that_would_see_nothing_of_the_experts_is_refused(pair, mode):
    model = pair[1]
    before = logits(model, PROMPTS[0])
    with mode(), pytest.raises(UnsupportedModelError, match=f"called in a {mode.__name__}"):
        logits(model, PROMPTS[0])
    assert torch.equal(logits(model, PROMPTS[0]), before)
