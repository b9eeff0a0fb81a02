"""Fast products: near the exact ones, the same for a row wherever and with however many threads, never past the end."""

from __future__ import annotations

import pytest
import torch

few_rows = pytest.importorskip("moe_offload.runtime.kernels.few_rows", exc_type=ImportError)


def matrices(slots, outputs, inputs):
    generator = torch.Generator().manual_seed(outputs + inputs)
    return torch.randn(slots, outputs, inputs, generator=generator).bfloat16()


def exact(x_PI, weight_SOI, slots_P):
    return torch.stack([weight_SOI[slot].double() @ x.double() for x, slot in zip(x_PI, slots_P.tolist(), strict=True)])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 2), (5, 6), (7, 34), (64, 256), (129, 258), (768, 2048)])
@pytest.mark.parametrize("slots", [[2], [1, 1], [0, 2, 2, 2, 0], [3] * 5])
def test_near_the_exact_sum(outputs, inputs, slots, threads):
    weight, x = matrices(4, outputs, inputs), matrices(1, len(slots), inputs)[0]
    got = few_rows.multiply_grouped(x, weight, torch.tensor(slots))
    want = exact(x, weight, torch.tensor(slots))
    scale = exact(x.abs(), weight.abs(), torch.tensor(slots))
    assert got.dtype == torch.bfloat16 and got.shape == (len(slots), outputs)
    assert bool(((got.double() - want).abs() <= want.abs() / 256 + scale * 1e-6).all()), "one rounding to bfloat16"


def test_a_row_is_worth_the_same_alone_and_with_any_number_of_threads():
    weight, x, slots = matrices(3, 1001, 514), matrices(1, 7, 514)[0], torch.tensor([0, 2, 2, 2, 1, 1, 0])
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results += [few_rows.multiply_grouped(x, weight, slots)]
        results += [torch.cat([few_rows.multiply_grouped(x[i : i + 1], weight, slots[i : i + 1]) for i in range(7)])]
        results += [
            torch.cat([few_rows.multiply_rows(x[i : i + 1], weight[slot]) for i, slot in enumerate(slots.tolist())])
        ]
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_only_the_slots_that_are_named_are_read(threads):
    weight = torch.full((5, 64, 128), float("nan"), dtype=torch.bfloat16)
    weight[3] = matrices(1, 64, 128)[0]
    x = matrices(1, 2, 128)[0]
    assert bool(few_rows.multiply_grouped(x, weight, torch.tensor([3, 3])).isfinite().all())
    assert bool(few_rows.multiply_grouped(x, weight, torch.tensor([3, 2]))[1].isnan().all())


def test_rows_of_a_bank_need_not_be_next_to_each_other():
    bank = matrices(1, 4, 64 * 128 + 32 * 64)[0]
    weight = bank[:, : 64 * 128].view(4, 64, 128)
    x, slots = matrices(1, 3, 128)[0], torch.tensor([2, 0, 3])
    assert few_rows.can_multiply(x, weight)
    assert torch.equal(
        few_rows.multiply_grouped(x, weight, slots), few_rows.multiply_grouped(x, weight.contiguous(), slots)
    )


def test_bias_is_added_before_the_one_rounding():
    weight, x, bias = matrices(1, 36, 64)[0], matrices(1, 2, 64)[0], matrices(1, 1, 36)[0, 0] * 64
    want = (x.double() @ weight.double().T + bias.double()).bfloat16()
    got = few_rows.multiply_rows(x, weight, bias)
    assert float((got == want).float().mean()) > 0.95 and torch.allclose(got.float(), want.float(), rtol=1 / 128)


@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan"), 3.3e38])
def test_what_is_no_number_stays_so(special):
    weight, x = torch.zeros(8, 64).bfloat16(), torch.ones(1, 64).bfloat16()
    weight[3, 5] = special
    weight[3, 9] = abs(special) if special == 3.3e38 else 0
    got, want = few_rows.multiply_rows(x, weight)[0], torch.mm(x, weight.t())[0]
    assert torch.equal(got.nan_to_num(1.0, 2.0, 3.0), want.nan_to_num(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(1, 8), torch.zeros(1, 8, 8)),
        (torch.zeros(1, 7).bfloat16(), torch.zeros(1, 8, 7).bfloat16()),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(1, 3, 8).bfloat16()),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(1, 8, 8).bfloat16().transpose(1, 2)),
        (torch.zeros(1, 16).bfloat16()[:, ::2], torch.zeros(1, 8, 8).bfloat16()),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(1, 8, 10).bfloat16()),
        (torch.zeros(1, 8).bfloat16().to("meta"), torch.zeros(1, 8, 8).bfloat16()),
    ],
)
def test_what_it_does_not_take(x, weight):
    assert not few_rows.can_multiply(x, weight)
