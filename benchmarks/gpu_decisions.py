"""A section of gpu_checks.py: what a layer launches beside its products and its attention, in microseconds.

Shapes: T tokens, E experts, K of them a token, S slots, P = T*K token-expert pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_timing import graph

from moe_offload.apps.bench.roofs.link import measure_us
from moe_offload.runtime.kernels import KERNELS, Kernels, Loads, make_pace
from moe_offload.runtime.kernels.state_block import StateBlock

DECISIONS = ((128, 32, 8), (128, 64, 8), (32, 16, 4), (128, 128, 128), (512, 512, 512))  # E, S, P
ROUTERS = ((128, 8, 64), (32, 4, 16), (256, 8, 64))  # E, K, S: Qwen3-30B-A3B, gpt-oss-20b, DeepSeek-V3
GATES = ((8, 768, 2048), (8, 1408, 2048))  # P, half of the outputs, hidden: Qwen3-30B-A3B, DeepSeek-V2-Lite
Say = Callable[..., None]


def time_decisions(options: argparse.Namespace, say: Say) -> None:
    kernels = KERNELS["cuda"]()
    _time_decide(kernels, options, say)
    _time_top(kernels, options, say)
    if not options.tiny:  # in bfloat16, which the interpreter cuts off
        _time_gates(kernels, options, say)


def _time_decide(kernels: Kernels, options: argparse.Namespace, say: Say) -> None:
    device = options.device
    for experts, slots, pairs in ((16, 4, 2),) if options.tiny else DECISIONS:
        everyone = torch.arange(experts, device=device).view(-1, pairs)  # in turn: each is gone when it comes round
        for what, events in (("all hits", everyone[:1].repeat(16, 1)), ("all misses", everyone)):
            if what == "all misses" and experts <= slots:
                continue
            state, loads = StateBlock([(experts, slots)], device).states[0], Loads.empty(pairs, device)
            one = partial(kernels.decide, state=state, loads=loads, pace_2=make_pace(1, 32.0, device))
            run = graph([partial(one, ids_P) for ids_P in events], device)
            taken = measure_us(run, device) / len(events)
            say("decide", f"E={experts} S={slots} P={pairs}, {what}", taken, "us", misses=int(loads.count_1))


def _time_top(kernels: Kernels, options: argparse.Namespace, say: Say) -> None:
    """The router's choice and the decision in one kernel, against torch.topk and then the decision."""
    device = options.device
    for experts, k, slots in ((16, 2, 4),) if options.tiny else ROUTERS:
        scores = [torch.randn(1, experts, device=device) for _ in range(16)]
        state, loads = StateBlock([(experts, slots)], device).states[0], Loads.empty(k, device)
        given: dict[str, Any] = {"state": state, "loads": loads, "pace_2": make_pace(1, 32.0, device)}

        def apart(scores_TE: torch.Tensor, k: int = k, given: dict[str, Any] = given) -> Any:
            return kernels.decide(torch.topk(scores_TE, k).indices.view(-1), **given)

        said = f"router E={experts} K={k} S={slots}"
        say("decide", f"{said}, chooses as torch.topk", kernels.chooses_as_torch(experts, k, torch.device(device)), "")
        for what, one in (("topk, then decide", apart), ("in one kernel", partial(kernels.decide_top, k=k, **given))):
            run = graph([partial(one, scores_TE) for scores_TE in scores], device)
            say("decide", f"{said}, {what}", measure_us(run, device) / len(scores), "us")


def _time_gates(kernels: Kernels, options: argparse.Namespace, say: Say) -> None:
    """Gate and up in one product, against the product and then the gate."""
    for pairs, half, hidden in GATES:
        bank = torch.randn(8 * pairs, 2 * half, hidden, dtype=torch.bfloat16, device=options.device)
        x_PH = torch.randn(pairs, hidden, dtype=torch.bfloat16, device=options.device)
        sets = torch.randperm(8 * pairs, device=options.device).view(8, pairs)

        def apart(slots_P: torch.Tensor, x_PH: torch.Tensor = x_PH, bank: torch.Tensor = bank) -> Any:
            gate, up = kernels.indexed_mm(x_PH, bank, slots_P).chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        for what, one in (("product, then gate", apart), ("in one", partial(kernels.gated_mm, x_PH, bank))):
            run = graph([partial(one, slots_P) for slots_P in sets], options.device)
            taken = measure_us(run, options.device) / len(sets)
            rate = pairs * bank[0].nbytes / taken / 1e3
            say("decide", f"gate P={pairs} 2x{half}x{hidden}, {what}", taken, "us", gb_s=round(rate))
