"""Blocks whose experts are stacked, or in lists of parameters, and read by a number: each way in which code does so.

Written for these tests, after the forms that published modelings have and not after their text. They take the place of
the blocks of `loops`, in the same decoder; `loop_models` builds it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.fakes.loop_models import build, offload, prompt, same, session
from tests.fakes.loops.modeling_loops import LOOPS, Block, Gate
from tests.fakes.masked_block import MaskedExperts

__all__ = ["STACK_LOOPS", "build", "offload", "prompt", "same", "session"]


class StackBlock(Block):
    """Routing as in `Block`; what holds the experts is `make`'s."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.gate, self.experts = Gate(config), self.make(config)

    def run(self, x, ids, weights):
        return self.experts(x, ids, weights)


class Stacked(nn.Module):
    """Two stacks, hit experts in a loop, indexed by a tensor without dimensions."""

    def __init__(self, config):
        super().__init__()
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.num_experts = e
        self.gate_up_proj = nn.Parameter(torch.randn(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.randn(e, h, i))

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = functional.one_hot(ids, self.num_experts + 1).permute(2, 1, 0)
        for hit in mask.sum((-1, -2)).nonzero():
            e = hit[0]
            choice, token = torch.where(mask[e])
            out.index_add_(0, token, self.one(e, x[token]) * weights[token, choice, None])
        return out

    def one(self, e, x):
        gate, up = functional.linear(x, self.gate_up_proj[e]).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down_proj[e])


class Biased(Stacked):
    """Transposed, interleaved, with biases, indexed by a tensor of one element."""

    def __init__(self, config):
        super().__init__(config)
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(e, h, 2 * i))
        self.gate_up_bias = nn.Parameter(torch.randn(e, 2 * i))
        self.down_proj = nn.Parameter(torch.randn(e, i, h))
        self.down_bias = nn.Parameter(torch.randn(e, h))

    def one(self, e, x):
        at = e[None]
        y = (x @ self.gate_up_proj[at] + self.gate_up_bias[at])[0]
        y = (y[..., 1::2] + 1) * functional.silu(y[..., ::2].clamp(max=7.0))
        return torch.matmul(y, self.down_proj[e]) + self.down_bias[e]


class Glu(nn.Module):
    """The weights of all experts one below the other; who uses them takes them apart."""

    def __init__(self, config):
        super().__init__()
        self.moe_num_experts = config.num_local_experts
        rows = config.num_local_experts * config.intermediate_size
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.randn(rows, config.hidden_size)) for _ in range(3))

    def forward(self, x, w1, v1, w2):
        return (functional.silu(x @ w1.T) * (x @ v1.T)) @ w2


class Joined(nn.Module):
    def __init__(self, config, up_front=False):
        super().__init__()
        self.mlp, self.up_front = Glu(config), up_front
        self.shape = (-1, config.intermediate_size, config.hidden_size)

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        weights_of = [w.view(self.shape) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2)]
        if self.up_front:
            count = self.mlp.moe_num_experts
            weights_of = [[one.squeeze(0) for one in w.chunk(count, dim=0)] for w in weights_of]
        for e in range(self.mlp.moe_num_experts):
            token, choice = torch.where(ids == e)
            if len(token):
                y = self.mlp(x[token], *(w[e] for w in weights_of))
                out.index_add_(0, token, y * weights[token, choice, None])
        return out


class Identities(Stacked):
    """Ids beyond the experts' are experts that do nothing: one of the stacks has a share for them, too."""

    def __init__(self, config):
        super().__init__(config)
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.real = e - 2
        self.down_proj = nn.Parameter(torch.randn(self.real, h, i))

    def one(self, e, x):
        e = int(e)
        return x if e >= self.real else super().one(e, x)


class Parallel(nn.Module):
    """Every expert is visited, with as many rows as it got: none, mostly."""

    def __init__(self, count, inputs, outputs):
        super().__init__()
        self.weight, self.num_experts = nn.Parameter(torch.randn(count, outputs, inputs)), count

    def forward(self, x, sizes):
        parts = x.split(sizes)
        return torch.cat([functional.linear(parts[e], self.weight[e]) for e in range(self.num_experts)])


class ParallelExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.input_experts, self.output_experts = Parallel(e, h, 2 * i), Parallel(e, i, h)

    def forward(self, x, ids, weights):
        order = ids.flatten().argsort(stable=True)
        sizes = ids.flatten().bincount(minlength=self.input_experts.num_experts).tolist()
        gate, up = self.input_experts(x[order // ids.shape[1]], sizes).chunk(2, -1)
        y = self.output_experts(functional.silu(gate) * up, sizes) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // ids.shape[1], y)


class GroupedExperts(nn.Module):
    """Ends of groups, and a stack that is gone through with enumerate."""

    def __init__(self, config):
        super().__init__()
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.fc1, self.fc2 = nn.Parameter(torch.randn(e, h, i)), nn.Parameter(torch.randn(e, i, h))

    def forward(self, x, ids, weights):
        order = ids.flatten().argsort(stable=True)
        ends = [0, *ids.flatten().bincount(minlength=len(self.fc1)).cumsum(0).tolist()]
        y = self.times(self.fc2, functional.gelu(self.times(self.fc1, x[order // ids.shape[1]], ends)), ends)
        out = torch.zeros_like(x)
        return out.index_add_(0, order // ids.shape[1], y * weights.flatten()[order, None])

    def times(self, stack, x, ends):
        out = torch.zeros(len(x), stack.shape[2], dtype=x.dtype)
        for e, matrix in enumerate(stack):
            out[ends[e] : ends[e + 1]] = torch.matmul(x[ends[e] : ends[e + 1]], matrix)
        return out


class ListExperts(nn.Module):
    """A list of parameters for each projection."""

    def __init__(self, config):
        super().__init__()
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.weight_gate, self.weight_up = (
            nn.ParameterList([nn.Parameter(torch.randn(i, h)) for _ in range(e)]) for _ in range(2)
        )
        self.weight_down = nn.ParameterList([nn.Parameter(torch.randn(h, i)) for _ in range(e)])
        self.bias_down = nn.ParameterList([nn.Parameter(torch.randn(h)) for _ in range(e)])

    def forward(self, x, ids, weights):
        order = ids.flatten().argsort(stable=True)
        parts = x[order // ids.shape[1]].split(ids.flatten().bincount(minlength=len(self.weight_up)).tolist())
        y = torch.cat([self.one(part, e) for e, part in enumerate(parts) if len(part)])
        out = torch.zeros_like(x)
        return out.index_add_(0, order // ids.shape[1], y * weights.flatten()[order, None])

    def one(self, x, e):
        y = functional.silu(functional.linear(x, self.weight_gate[e])) * functional.linear(x, self.weight_up[e])
        return functional.linear(y, self.weight_down[e], self.bias_down[e])


class UncalledExperts(nn.Module):
    """No code of its own: the block around it reads its stacks."""

    def __init__(self, config):
        super().__init__()
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.up, self.down = nn.Parameter(torch.randn(e, i, h)), nn.Parameter(torch.randn(e, h, i))

    def go_through(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, choice = torch.where(ids == e)
            y = functional.linear(functional.silu(functional.linear(x[token], self.up[e])), self.down[e])
            out.index_add_(0, token, y * weights[token, choice, None])
        return out


class UncalledBlock(StackBlock):
    make = staticmethod(UncalledExperts)

    def run(self, x, ids, weights):
        return UncalledExperts.go_through(self.experts, x, ids, weights)


class RoutingExperts(UncalledExperts):
    """Their router is in them, so they are called with hidden states alone."""

    def __init__(self, config):
        super().__init__(config)
        self.router = Gate(config)

    def forward(self, x):
        ids, weights = self.router(x)
        return self.go_through(x, ids, weights.to(x.dtype))


class RoutingBlock(StackBlock):
    make = staticmethod(RoutingExperts)

    def run(self, x, ids, weights):
        return self.experts(x)


class CapacityExperts(Stacked):
    """Every expert gets as many rows, most of them zero: all of them are used in every step."""

    def forward(self, x, ids, weights):
        combine = torch.zeros(self.num_experts, len(x), dtype=x.dtype)
        combine[ids.flatten(), torch.arange(len(x)).repeat_interleave(ids.shape[1])] = weights.flatten()
        inputs = x * (combine != 0)[..., None]
        outputs = torch.stack([self.one(e, inputs[e]) for e in range(self.num_experts)])
        return (outputs * combine[..., None]).sum(0)


class MaskedBlock(Block):
    """Every expert is handed every token, zeros where the router did not send it: the form "masked"."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = MaskedExperts(config.num_local_experts, config.hidden_size, config.intermediate_size)

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = self.router(x)
        values, ids = logits.topk(self.top_k)
        scores = torch.full_like(logits, float("-inf")).scatter(1, ids, values).float().sigmoid().to(x.dtype)
        masked = x.repeat(scores.shape[1], 1) * scores.t().reshape(-1, 1)
        return self.experts(masked).view(scores.shape[1], *hidden.shape).sum(0)


def _block(experts):
    return type(f"{experts.__name__}Block", (StackBlock,), {"make": staticmethod(experts)})


def _named(name, experts):
    """The class under a name that says what it holds, as published ones do."""
    return type(name, (experts,), {})


STACK_LOOPS = {
    "stacked": _block(_named("StackedExperts", Stacked)),
    "biased": _block(_named("BiasedExperts", Biased)),
    "joined": _block(Joined),
    "joined_up_front": type("UpFrontBlock", (StackBlock,), {"make": staticmethod(lambda c: Joined(c, up_front=True))}),
    "stack_identities": _block(_named("IdentityExperts", Identities)),
    "parallel": _block(ParallelExperts),
    "grouped": _block(GroupedExperts),
    "lists": _block(ListExperts),
    "uncalled": UncalledBlock,
    "routing": RoutingBlock,
    "stack_capacity": _block(CapacityExperts),
}
LOOPS.update(STACK_LOOPS, masked=MaskedBlock)
