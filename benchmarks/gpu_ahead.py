"""A section of gpu_checks.py: reading ahead beside a layer's products, each step within one CUDA graph, as in decoding.

Shapes: P token-expert pairs, E experts, S slots, G staged rows, N elements of one row, H hidden.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_timing import graph

from moe_offload.apps.bench.roofs.link import measure_us, registered_memory
from moe_offload.memory.transfer.fork import FORKS
from moe_offload.runtime.kernels import KERNELS, Loads
from moe_offload.runtime.kernels.staging import STAGERS, Staging
from moe_offload.runtime.kernels.state_block import StateBlock

Say = Callable[..., None]
ROW_MB, PAIRS, HIDDEN = 9.4, 8, 2048  # Qwen3-30B-A3B
TURNS = 12  # of the products with 8 rows of 9.4 MB: in all about what attention and products of a layer take


class Rig:
    """P rows to be staged, P others to multiply with; all that is missing of a guess was asked for."""

    def __init__(self, view_B: torch.Tensor, pairs: int, columns: int, hidden: int, device: str):
        self.stagers, self.kernels = STAGERS["cuda"](), KERNELS["cuda"]()
        self.fork = FORKS[torch.device(device).type](torch.device(device))
        self.rows_EN = view_B.view(torch.bfloat16).view(-1, columns)
        self.state = StateBlock([(2 * pairs, 2 * pairs)], device).states[0]
        self.staging, self.loads = Staging.empty(pairs, device), Loads.empty(pairs, device)
        self.ids_P = torch.arange(pairs, device=device)
        self.loads.expert_P.copy_(self.ids_P)
        self.loads.slot_P.copy_(self.ids_P)
        self.loads.count_1.fill_(pairs)
        self.scratch_GN = torch.zeros(pairs, columns, dtype=torch.bfloat16, device=device)
        self.bank_SN = torch.zeros(2 * pairs, columns, dtype=torch.bfloat16, device=device)
        self.x_PH = torch.zeros(pairs, hidden, dtype=torch.bfloat16, device=device)

    def products(self, turns: int) -> None:
        hidden = self.x_PH.shape[1]
        weight_SMH = self.bank_SN[:, : self.bank_SN.shape[1] // hidden * hidden].unflatten(1, (-1, hidden))
        for _ in range(turns):
            self.kernels.indexed_mm(self.x_PH, weight_SMH, self.ids_P + len(self.ids_P))

    def begin(self) -> None:
        self.stagers.choose(self.ids_P, self.ids_P, self.state, self.staging)
        with self.fork.begin():
            self.stagers.stage(self.rows_EN, self.scratch_GN, self.staging)

    def end(self) -> None:
        self.staging.stop_1.fill_(1)
        self.fork.join()

    def gather(self) -> None:
        self.kernels.gather(self.rows_EN, self.bank_SN, self.loads)

    def gather_staged(self) -> None:
        self.stagers.gather_staged(self.rows_EN, self.scratch_GN, self.bank_SN, self.loads, self.state, self.staging)


def measure(options: argparse.Namespace, say: Say) -> None:
    """What it takes from the products, what it saves, how soon it stops, and what its launches cost when it is off."""
    device, pairs, hidden = options.device, 2 if options.tiny else PAIRS, 1024 if options.tiny else HIDDEN
    columns = int((0.02 if options.tiny else ROW_MB) * 1e6) // 4096 * 2048  # rows are whole pages
    with registered_memory(2 * pairs * columns * 2, device) as (_, view_B):
        rig = Rig(view_B, pairs, columns, hidden, device)
        products = partial(rig.products, 1 if options.tiny else TURNS)
        steps: tuple[tuple[str, list[Callable[[], Any]], bool], ...] = (
            ("products alone", [products], True),
            ("products, then the rows from the host", [products, rig.gather], True),
            ("staged beside the products, to the end", [rig.begin, products, rig.fork.join], True),
            ("the same, stopped when the products are through", [rig.begin, products, rig.end], True),
            ("the same, then all rows from wherever they are", [rig.begin, products, rig.end, rig.gather_staged], True),
            ("stopped at once", [rig.begin, rig.end], True),
            ("switched off: the launches alone", [rig.begin, rig.end, rig.gather_staged], False),
        )
        for what, calls, on in steps:
            rig.staging.on_1.fill_(int(on))
            rig.loads.count_1.fill_(pairs if on else 0)
            taken = measure_us(graph(calls, device), device)
            reached = int(rig.staging.reached_R.sum()) if rig.begin in calls else 0
            say("ahead", f"{pairs} rows, {what}", taken, "us", chunks_staged=reached)
