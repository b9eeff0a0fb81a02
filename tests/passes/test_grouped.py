"""The grouped matmul of the CPU: the same bits as one product per run, of exactly its rows."""

from __future__ import annotations

import pytest
import torch

from passes import grouped


def exact(x_PI, weight_SIO, slots_P):
    """One product per run of equal slots, of exactly its rows."""
    runs, lengths = torch.unique_consecutive(slots_P, return_counts=True)
    parts = x_PI.split(lengths.tolist())
    return torch.cat([part @ weight_SIO[slot] for part, slot in zip(parts, runs.tolist(), strict=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lengths", [[1], [13], [9, 1, 30], [5, 0, 100, 2, 17], [300, 41, 8, 9]])
def test_runs_of_any_length(dtype, transposed, lengths):
    torch.manual_seed(0)
    weight = torch.randn(len(lengths), 96, 64).to(dtype) if transposed else torch.randn(len(lengths), 64, 96).to(dtype)
    weight = weight.mT if transposed else weight
    order = torch.randperm(len(lengths))  # slots lie in another order than the groups
    slots = torch.cat([torch.full((n,), int(slot)) for n, slot in zip(lengths, order, strict=True)])
    x = torch.randn(len(slots), 64).to(dtype)
    assert torch.equal(grouped.grouped_mm(x, weight, slots), exact(x, weight, slots))


def test_every_run_is_multiplied_with_exactly_its_rows(monkeypatch):
    """On a processor with AMX, rows among more rows come out otherwise; here that may go unnoticed."""
    asked = []
    right = torch.mm

    def spy(a, b, **more):
        asked.append(len(a))
        return right(a, b, **more)

    monkeypatch.setattr(torch, "mm", spy)
    weight, x = torch.randn(2, 64, 96).bfloat16(), torch.randn(24, 64).bfloat16()
    grouped.grouped_mm(x, weight, torch.tensor([0] * 9 + [1] * 2 + [0] * 13))
    assert asked == [9, 2, 13]


def test_results_are_scattered_within_autocast_of_another_dtype():
    """index_copy is one of the operations that autocast promotes, and it refuses two half-precision dtypes."""
    part, pairs, like = torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([3, 1]), torch.zeros(4)
    with torch.autocast("cpu", torch.float16):
        found = grouped.scatter_pairs(part, pairs, like)
    assert found.dtype == torch.bfloat16 and found.sum(1).tolist() == [0, 3, 0, 3]
