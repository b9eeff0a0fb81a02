"""What experts that are called, or read, one by one cost when every one of them is resident.

    OMP_NUM_THREADS=1 python benchmarks/called.py                                     small, so that the cost is seen
    OMP_NUM_THREADS=1 python benchmarks/called.py --hidden 1024 --inner 3584          as large as they are

Both sides run in one process, neither is compiled: the unmodified model, and the same one offloaded with a budget that
holds all experts. They take turns step by step, and who goes first alternates, so that a busy machine slows both.
Reported are medians over pairs of decode steps, by the clock of this thread, which does not run while others do; and,
from steps with few and with many uses, what is paid more for each use of an expert (of three matrices) and each step.
That counts whatever the use of an expert drives out of the caches; `the call itself` is that of an expert that computes
nothing, called again and again.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

import moe_offload
from moe_offload.runtime.prewarm import prewarm_slots

FORMS = ("modules", "stacks", "lists")
FEW, MANY = 2, 8  # of 8 experts are used


class Config(PretrainedConfig):
    model_type = "called_experts"
    hidden, inner, layers, form, num_experts, num_experts_per_tok = 64, 96, 4, "modules", 8, 2


class Expert(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate, self.up = (nn.Linear(config.hidden, config.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(config.inner, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class ReadExperts(nn.Module):
    """Weights that are indexed by a number: of stacks, or of lists."""

    def __init__(self, config: Config):
        super().__init__()
        for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            shape = tuple(config.inner if size == 96 else config.hidden for size in shape)
            each = [torch.randn(shape) * 0.02 for _ in range(config.num_experts)]
            lists = nn.ParameterList([nn.Parameter(one) for one in each])
            setattr(self, name, nn.Parameter(torch.stack(each)) if config.form == "stacks" else lists)

    def __getitem__(self, e: int) -> Any:
        return lambda x: self.run(x, e)

    def run(self, x: Tensor, e: int) -> Tensor:
        y = functional.silu(functional.linear(x, self.gate[e])) * functional.linear(x, self.up[e])
        return functional.linear(y, self.down[e])


class Nothing(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.gate = config.num_experts_per_tok, nn.Linear(config.hidden, config.num_experts, bias=False)
        modules = [Expert(config) for _ in range(config.num_experts)]
        self.experts = nn.ModuleList(modules) if config.form == "modules" else ReadExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, choice, None])
        return out


class Caller(nn.Module):
    """Calls experts that compute nothing, and knows how long a call took."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.num_experts, bias=False)
        self.top_k, self.experts = 2, nn.ModuleList([Nothing(config) for _ in range(config.num_experts)])
        self.took_us = 0.0

    def forward(self, x: Tensor) -> Tensor:
        experts, rounds = list(self.experts), 200
        begun = time.thread_time()
        for _ in range(rounds):
            for expert in experts:
                expert(x)
        self.took_us = (time.thread_time() - begun) / (rounds * len(experts)) * 1e6
        return x


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config):
        super().__init__(config)
        kind: Any = Caller if config.form == "nothing" else Block
        self.layers = nn.ModuleList([kind(config) for _ in range(config.layers)])
        self.post_init()

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        return inputs_embeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--inner", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.layers} layers of 8 experts")
    plain, ours = call_nothing()
    print(f"the call itself: plain {plain:.1f} us, ours {ours:.1f}: +{ours - plain:.1f} us")
    print(f"{'form':<10}{'uses a layer':>14}{'plain us':>10}{'ours us':>10}{'overhead':>10}")
    for form in FORMS:
        few, many = (measure(form, top_k, options) for top_k in (FEW, MANY))
        one = (many - few) / (options.layers * (MANY - FEW))
        print(
            f"{form}: +{one:.1f} us a use of an expert, +{few - one * options.layers * FEW:.0f} us a step", flush=True
        )


@torch.no_grad()
def call_nothing() -> tuple[float, float]:
    """Microseconds of a call of an expert, plain and offloaded."""
    config = Config(layers=1, form="nothing")
    plain, ours = Model(config).eval(), offload(Model(config).eval())
    took: list[tuple[float, float]] = []
    x = torch.randn(1, config.hidden)
    for _ in range(50):
        plain(x), ours(x)
        took.append((plain.layers[0].took_us, ours.layers[0].took_us))
    return statistics.median(one for one, _ in took), statistics.median(one for _, one in took)


def offload(model: Model) -> Model:
    """`model` with all of its experts resident."""
    moe_offload.optimize(model, "4GB", device_map="cpu", config={"profile": "off", "reserve": 0})
    handle = model.moe_offload
    prewarm_slots(handle._runtime, [(moe.index, e) for moe in handle.moe_layers for e in range(moe.num_experts)])
    return model


@torch.no_grad()
def measure(form: str, top_k: int, options: argparse.Namespace) -> float:
    """Microseconds that a step takes more."""
    config = Config(hidden=options.hidden, inner=options.inner, layers=options.layers, form=form)
    config.num_experts_per_tok = top_k
    plain, ours = (Model(config).eval() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    handle = offload(ours).moe_offload
    seconds: list[list[float]] = []
    for step in range(options.steps):
        x = torch.randn(1, options.hidden)
        taken, outputs = [0.0, 0.0], {}
        for side in (0, 1) if step % 2 else (1, 0):
            begun = time.thread_time()
            outputs[side] = (plain, ours)[side](x)
            taken[side] = time.thread_time() - begun
        seconds.append(taken)
        if not torch.equal(*outputs.values()):
            raise SystemExit("outputs differ")
    if handle.stats().misses:
        raise SystemExit(f"missed while being timed: {handle.stats()}")
    counted = seconds[len(seconds) // 5 :]
    a, b = (statistics.median(one[side] for one in counted) * 1e6 for side in (0, 1))
    more = statistics.median(theirs - own for own, theirs in counted) * 1e6
    print(f"{form:<10}{top_k:>14}{a:>10.0f}{b:>10.0f}{more / a:>+10.1%}", flush=True)
    handle.close()
    return more


if __name__ == "__main__":
    main()
