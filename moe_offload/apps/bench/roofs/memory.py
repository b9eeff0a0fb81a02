"""How fast memory is read: the roof of a decoded token, which computes with each weight that it touches once."""

from __future__ import annotations

import time

import torch

BYTES = 2**30  # more than any cache holds
REPEATS = 5


def memory_roof() -> float:
    """Bytes per second of all of torch's threads that only add up a gigabyte of numbers; the fastest of some times."""
    numbers = torch.ones(BYTES // 4, dtype=torch.float32)
    return BYTES / min(_sum_s(numbers) for _ in range(REPEATS))


def _sum_s(numbers: torch.Tensor) -> float:
    begun = time.perf_counter()
    numbers.sum()
    return time.perf_counter() - begun
