"""What is tried out about a product is what is then done: the very strips, the last one too."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from moe_offload.checkpoint.quantised import weights
from moe_offload.checkpoint.quantised.weights import Matrix, MatrixWeight
from moe_offload.packed import FORMATS, exact
from tests.packed.matrices import fp8, int4, same_bits

PAIRS = {  # two matrices below each other, as gate and up are
    "int4": [int4(100, 256, 8, torch.bfloat16)] * 2,
    "fp8": [fp8(384, 256, torch.full((4, 2), 1e-2)), fp8(288, 256, torch.full((3, 2), 2e-2))],
}


def test_strips_are_exact_only_if_the_last_one_is(monkeypatch):
    """With a product that rounds otherwise where a strip has few rows."""
    mm = torch.mm

    def other_by_shape(x, weight, *, out=None):
        found = mm(x, weight) + (weight.shape[1] < 16) * 0.5
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(torch, "mm", other_by_shape)
    exact._strips_are_exact.cache_clear()
    assert not exact.strips_are_exact((64, 64, 8), 48, torch.float32)
    exact._strips_are_exact.cache_clear()


def test_another_order_of_sums_does_not_pass(monkeypatch):
    """One that differs in the last bits of float32: a bfloat16 result of random numbers seldom shows it."""
    mm = torch.mm

    def halves_first(x, weight, *, out=None):
        middle = weight.shape[0] // 2
        whole = weight.shape[1] == 1024
        found = mm(x.float(), weight.float())
        if not whole:
            found = mm(x[:, :middle].float(), weight[:middle].float()) + mm(
                x[:, middle:].float(), weight[middle:].float()
            )
        found = found.to(x.dtype)
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(torch, "mm", halves_first)
    exact._strips_are_exact.cache_clear()
    assert not exact.strips_are_exact((512, 512), 256, torch.bfloat16)
    exact._strips_are_exact.cache_clear()


@pytest.mark.parametrize("kind", PAIRS)
def test_the_strips_that_are_tried_are_those_that_are_multiplied(kind, monkeypatch):
    tried, multiplied, mm = [], [], torch.mm
    monkeypatch.setattr(weights, "STRIP_BYTES", 48 * 256 * 2)
    monkeypatch.setattr(weights, "find_order", lambda *_, **__: None)  # as where no kernel knows torch's order of sums
    monkeypatch.setattr(weights, "strips_are_exact", lambda heights, *_: tried.extend(heights) or True)
    pair = PAIRS[kind]
    formats = [FORMATS[kind].fit(tensors) for tensors in pair]
    matrices = []
    for format, tensors in zip(formats, pair, strict=True):
        fields = tuple(SimpleNamespace(view_in=lambda row, tensor=tensor: tensor) for tensor in tensors)
        matrices.append(Matrix(format, fields, format.shape(tensors)))
    rows = sum(matrix.shape[0] for matrix in matrices)
    weight = MatrixWeight("w", (rows, 256), torch.bfloat16, tuple(matrices), ())
    monkeypatch.setattr(weights, "joins_bytes", lambda conversions: True)
    whole = torch.empty(rows, 256, dtype=torch.bfloat16)
    weight.unpack(torch.empty(0), whole)

    def recorded(x, other, out):
        multiplied.append(other.shape[1])
        mm(x, other, out=out)

    monkeypatch.setattr(weights, "multiply_exactly", recorded)
    x, out = torch.ones(1, 256, dtype=torch.bfloat16), torch.empty(1, rows, dtype=torch.bfloat16)
    weight.multiply(x, torch.empty(1, 0), [(0, 0, 1)], out, transposed=True)
    assert tried == multiplied and sum(tried) == rows
    assert same_bits(out, torch.cat([mm(x, part.t()) for part in whole.split(tried)], 1))


def test_decoding_does_not_depend_on_prompts(monkeypatch):
    """A library whose products of 8 rows and more have other bits from the side, as with AMX."""

    def other_bits_from_8_rows_on(x, matrix, *, out):
        found = (x.double() @ matrix.double()).to(x.dtype)
        return out.copy_(found if len(x) < 8 or matrix.is_contiguous() else found + 1)

    monkeypatch.setattr(torch, "mm", other_bits_from_8_rows_on)
    exact._transposed_is_exact.cache_clear()
    found = {rows: exact.transposed_is_exact(rows, 48, 32, torch.bfloat16) for rows in (1, 4, 5, 8, 300)}
    exact._transposed_is_exact.cache_clear()
    assert found == {1: True, 4: True, 5: False, 8: False, 300: False}


def _other_bits_without_onednn(x, matrix, *, out):
    found = (x.double() @ matrix.double()).to(x.dtype)
    return out.copy_(found if torch.backends.mkldnn.enabled or matrix.is_contiguous() else found + 1)


def test_what_a_program_switches_is_tried_anew(monkeypatch):
    monkeypatch.setattr(torch, "mm", _other_bits_without_onednn)
    exact._transposed_is_exact.cache_clear()
    ask = partial(exact.transposed_is_exact, 1, 48, 32, torch.bfloat16)
    found = [ask()]
    with torch.backends.mkldnn.flags(enabled=False):
        found.append(ask())
    found.append(ask())
    exact._transposed_is_exact.cache_clear()
    assert found == [True, False, True]


def test_autocast_does_not_answer_for_another_dtype(monkeypatch):
    """A first call within autocast: the products themselves are not converted by it, so those of the trial are not."""
    dtypes, mm = set(), torch.mm

    def recorded(x, matrix, *, out=None):
        found = mm(x, matrix) if out is None else mm(x, matrix, out=out)
        dtypes.add(found.dtype)
        return found

    monkeypatch.setattr(torch, "mm", recorded)
    exact._transposed_is_exact.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        exact.transposed_is_exact(1, 48, 32, torch.float32)
    exact._transposed_is_exact.cache_clear()
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_are_compared_in_any_dtype(dtype):
    zeros = torch.zeros(4).to(dtype)
    assert exact.same_bits(zeros, zeros.clone()) and not exact.same_bits(
        zeros, torch.tensor([0.0, 0, 0, -0.0]).to(dtype)
    )


def test_the_trials_of_a_model_in_float64():
    exact.strips_are_exact((64, 64), 320, torch.float64)
    exact.transposed_is_exact(1, 128, 320, torch.float64)
