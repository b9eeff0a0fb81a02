"""The grouped matmul of the CPU: the same bits as one product per run, with few distinct row counts."""

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


def test_few_row_counts_and_little_waste():
    counts = {grouped.rounded(rows) for rows in range(1, 4097)}
    assert len(counts) <= 64
    assert all(rows <= grouped.rounded(rows) <= rows + max(7, rows // 8) for rows in range(1, 4097))
    assert all(grouped.rounded(rows) == rows for rows in range(1, grouped.FEW + 1))


def test_row_counts_that_reach_the_library(monkeypatch):
    """Runs of 9 to 16 rows are one kernel where rows are independent, and eight where they are not."""
    asked = []
    right = torch.mm

    def spy(a, b, **more):
        asked.append(len(a))
        return right(a, b, **more)

    weight, x = torch.randn(1, 64, 96).bfloat16(), torch.randn(16, 64).bfloat16()
    for independent, expected in ((True, {16}), (False, set(range(9, 17)))):
        monkeypatch.setattr(grouped, "rows_are_independent", lambda *_, answer=independent: answer)
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", spy)
            for rows in range(9, 17):
                grouped.grouped_mm(x[:rows], weight, torch.zeros(rows, dtype=torch.int64))
        assert set(asked) == expected


def test_rows_that_depend_on_their_number_are_noticed(monkeypatch):
    right = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: right(a, b) + len(a))
    grouped.rows_are_independent.cache_clear()
    try:
        assert not grouped.rows_are_independent((64, 96), (96, 1), 1)
    finally:
        grouped.rows_are_independent.cache_clear()
