"""What is staged, as tensors of the compute device at addresses that never change: what a CUDA graph can use.

Shapes: G staged rows, R programs that copy them.

The chunks of all staged rows are numbered through, row after row, and dealt out in turn: chunk j is the (j // R)th of
program j % R. So one number a program tells which chunks are there:

    chunk j is in scratch  where  reached_R[j % R] > j // R

A copy that is stopped half way is no loss: what it has brought is used, the rest comes from where it always comes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Of all kernels that copy rows: a quarter to a half of a large GPU's processors. The link is full, and others can run
#: beside it.
PROGRAMS = 64
CHUNK = 2048  # words of 8 bytes: 16 KiB a program under way, a third of a microsecond of a PCIe 5 link; 1 MiB in all


@dataclass(frozen=True)
class Staging:
    """`expert_G` are the experts of one layer whose rows are staged, -1 after the first `count_1`. `stop_1` is raised
    by what needs the link, `on_1` is lowered where guesses are not worth it."""

    expert_G: Tensor  # int32
    count_1: Tensor  # int32
    reached_R: Tensor  # int32: chunks that each program has copied
    stop_1: Tensor  # int32
    on_1: Tensor  # int32

    @staticmethod
    def empty(rows: int, device: torch.device | str) -> Staging:
        def full(size: int, value: int) -> Tensor:
            return torch.full((size,), value, dtype=torch.int32, device=device)

        with torch.inference_mode(False):  # what is made within that mode cannot be written outside of it
            return Staging(full(rows, -1), full(1, 0), full(PROGRAMS, 0), full(1, 0), full(1, 1))

    def first(self, rows: int) -> Staging:
        """The same for layers whose rows are larger: scratch has no more of them than `rows`."""
        return replace(self, expert_G=self.expert_G[:rows])


def words_of(rows: Tensor) -> Tensor:
    """Rows as words of 8 bytes. Raises `ValueError` where they are not contiguous multiples of 16 bytes."""
    if rows.shape[1] * rows.itemsize % 16 or rows.stride(1) != 1:
        raise ValueError(
            f"rows of {rows.shape[1]} {rows.dtype} with strides {rows.stride()}: whole multiples of 16 bytes are copied"
        )
    return rows.view(torch.int64)
