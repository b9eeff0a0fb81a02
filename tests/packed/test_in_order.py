"""Products of few rows have torch's bits: added up in its order, or left to it."""

import os
import subprocess
import sys

import pytest
import torch

from moe_offload.experts import RowLayout
from moe_offload.packed import FORMATS, exact
from moe_offload.packed.exact import ORDERS, Order, find_order
from moe_offload.packed.ordered import Place, multiply_in_order, multiply_rows_in_order, shape_for_kernels
from tests.packed.matrices import fp8, int4, mxfp4
from tests.paths import ROOT

OUTPUTS, INPUTS = 80, 1536  # a last tile that overlaps, and three chunks of 512
pytestmark = pytest.mark.skipif(exact.multiplier() is None, reason="no kernel for this processor")


@pytest.fixture(autouse=True)
def tried_anew():
    exact._find_orders.cache_clear()
    yield
    exact._find_orders.cache_clear()


def cancelling(rows, outputs, inputs):
    return next(iter(exact.trials(rows, outputs, inputs, torch.bfloat16)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_products_have_torchs_bits_where_an_order_is_found(rows, turned):
    order = find_order(rows, OUTPUTS, INPUTS, torch.bfloat16, turned=turned)
    if order is None:
        pytest.skip("torch adds up in none of the known orders here")
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16()
    matrix = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = torch.empty(rows, OUTPUTS + 3, dtype=torch.bfloat16)[:, 1:-2]
    for x_MI, matrix_OI in ((x, matrix), cancelling(rows, OUTPUTS, INPUTS)):
        exact.multiplier()(x_MI, matrix_OI, out, *order)
        assert torch.equal(out, torch.mm(x_MI, matrix_OI.t().contiguous() if turned else matrix_OI.t()))


def test_the_orders_are_told_apart():
    """Each gives other bits than the others where products cancel: one that is not torch's cannot be taken for it."""
    x, matrix = cancelling(2, OUTPUTS, INPUTS)
    found = []
    for order in ORDERS:
        found.append(torch.empty(2, OUTPUTS, dtype=torch.bfloat16))
        exact.multiplier()(x, matrix, found[-1], *order)
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert (one != other).float().mean() > 0.3


def in_order(x, matrix, *, paired, chunk):
    """What `compiled/in_order/sums.py` says, in plain torch, with one rounding for each sum."""
    total = torch.zeros(len(x), len(matrix))
    products = x.float()[:, None] * matrix.float()
    for begin in range(0, products.shape[-1], chunk):
        part = products[..., begin : begin + chunk]
        if paired:
            even = odd = torch.zeros_like(total)
            for i in range(0, part.shape[-1], 2):
                even, odd = even + part[..., i], odd + part[..., i + 1]
            total = total + (even + odd)
        else:
            chunk_total = torch.zeros_like(total)
            for i in range(0, part.shape[-1], 2):
                chunk_total = (chunk_total + part[..., i + 1]) + part[..., i]
            total = total + chunk_total
    return total.bfloat16()


@pytest.mark.parametrize("order", ORDERS)
def test_the_kernel_adds_up_as_it_says(order):
    for x, matrix in exact.trials(3, OUTPUTS, INPUTS, torch.bfloat16):
        if matrix.abs().max() < 1e-9:
            continue  # denormal numbers are zero to the kernel
        out = torch.empty(3, OUTPUTS, dtype=torch.bfloat16)
        exact.multiplier()(x, matrix, out, *order)
        assert torch.equal(out, in_order(x, matrix, paired=order.paired, chunk=order.chunk))


def test_another_order_of_sums_is_not_taken_for_a_known_one(monkeypatch):
    mm = torch.mm

    def halves_first(x, matrix, *, out):
        half = len(matrix) // 2
        return out.copy_(
            mm(x[:, :half].float(), matrix[:half].float()) + mm(x[:, half:].float(), matrix[half:].float())
        )

    monkeypatch.setattr(torch, "mm", halves_first)
    assert find_order(1, OUTPUTS, INPUTS, torch.bfloat16, turned=False) is None


def test_zeros_of_another_sign_are_not_taken_for_the_same(monkeypatch):
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w, *, out: mm(x, w, out=out).add_(0.0))
    assert find_order(1, OUTPUTS, INPUTS, torch.bfloat16, turned=False) is None


def test_a_library_that_keeps_denormal_numbers_is_not_taken_for_one_that_does_not(monkeypatch):
    def keeps_them(x, matrix, *, out):
        found = in_order(x, matrix.t(), paired=True, chunk=32)
        return out.copy_(found)

    monkeypatch.setattr(torch, "mm", keeps_them)
    assert find_order(1, OUTPUTS, INPUTS, torch.bfloat16, turned=False) is None


@pytest.mark.parametrize("isa", ["AVX512_CORE_BF16", "AVX512_CORE", "AVX2"])
@pytest.mark.skipif(sys.platform != "linux", reason="asks oneDNN for other instructions by its variable")
def test_other_processors(isa):
    """oneDNN of a processor without AMX adds up in chunks; of an older one, in an order that is not known: None."""
    program = (
        "import torch; from moe_offload.packed.exact import find_order\n"
        f"print([find_order(rows, {OUTPUTS}, {INPUTS}, torch.bfloat16, turned=False) for rows in (1, 2)])"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = eval(done.stdout, {"Order": Order})
    assert all(order is None or not order.paired for order in found)
    if isa == "AVX512_CORE_BF16" and torch.cpu._is_avx512_bf16_supported():
        assert found == [Order(paired=False, chunk=512), Order(paired=False, chunk=1024)]


MATRICES = {
    "mxfp4": lambda: mxfp4(OUTPUTS, INPUTS // 32),
    "fp8": lambda: fp8(OUTPUTS, INPUTS, torch.rand(5, 12, generator=torch.Generator().manual_seed(3)) * 0.01 + 1e-4),
    "fp8 rows": lambda: fp8(OUTPUTS, INPUTS, torch.rand(OUTPUTS, 1, generator=torch.Generator().manual_seed(3)) + 0.1),
    "fp8 blocks": lambda: fp8(128, INPUTS, torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) * 0.01 + 1e-4),
    "int4": lambda: int4(OUTPUTS, INPUTS, INPUTS // 32, torch.bfloat16),
    "int4 wide": lambda: int4(OUTPUTS, INPUTS, INPUTS // 128, torch.float32),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", MATRICES)
def test_codes_are_multiplied_as_if_they_were_unpacked(kind, rows, order):
    tensors = MATRICES[kind]()
    format = FORMATS[kind.split()[0]].fit(tensors)
    outputs, _ = format.shape(tensors)
    matrix = torch.empty(outputs, INPUTS, dtype=torch.bfloat16)
    format.unpack(tensors, matrix)
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = (torch.empty(rows, outputs, dtype=torch.bfloat16) for _ in range(2))
    assert multiply_in_order(format, tensors, x, found, order)
    exact.multiplier()(x, matrix, expected, *order)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", MATRICES)
def test_matrices_of_many_rows_are_multiplied_together(kind, order):
    """Two matrices below each other in each row, and a lower one: as gate, up, and something else would be."""
    tensors = MATRICES[kind]()
    format = FORMATS[kind.split()[0]].fit(tensors)
    outputs, low = format.shape(tensors)[0], format.rows(tensors, 0, 64)
    parts = [part for matrix in (tensors, tensors, low) for part in matrix]
    layout = RowLayout.in_order((str(i), tuple(part.shape), part.dtype) for i, part in enumerate(parts))
    rows = torch.zeros(4, layout.row_bytes, dtype=torch.uint8)
    for slot in range(4):
        for i, (field, part) in enumerate(zip(layout.fields, parts, strict=True)):
            rolled = part.view(torch.uint8).roll(slot + i // 2, 0)
            field.view_in(rows[slot]).view(torch.uint8).copy_(rolled)
    pairs = [tuple(layout.fields[i : i + 2]) for i in (0, 2, 4)]
    places = []
    for codes, scales in pairs:
        view = (codes.view_in(rows[0]), scales.view_in(rows[0]))
        places.append(Place(codes.offset, scales.offset, codes.shape[0], shape_for_kernels(format, view)))
    x = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.full((7, 2 * outputs + 64), 7.0, dtype=torch.bfloat16)
    runs = [(2, 1, 3), (0, 3, 5), (3, 5, 7)]
    assert multiply_rows_in_order(places, x, rows, runs, out, order) == []
    assert (out[0] == 7).all()
    for slot, begin, end in runs:
        first = 0
        for codes, scales in pairs:
            height = codes.shape[0]
            matrix = torch.empty(height, INPUTS, dtype=torch.bfloat16)
            format.unpack((codes.view_in(rows[slot]), scales.view_in(rows[slot])), matrix)
            expected = torch.empty(2, height, dtype=torch.bfloat16)
            exact.multiplier()(x[begin:end], matrix, expected, *order)
            assert torch.equal(out[begin:end, first : first + height], expected)
            first += height
    pairs[1][1].view_in(rows[0]).view(torch.uint8)[-1].fill_(0)  # the smallest power of two; elsewhere zero
    left = multiply_rows_in_order(places, x, rows, runs, out, order)
    assert left == ([(0, 3, 5)] if kind in ("mxfp4", "fp8 blocks") else [])


def test_a_result_of_another_shape_is_refused():
    """Kernels write to addresses: what does not fit would be somebody else's memory."""
    tensors = mxfp4(OUTPUTS, INPUTS // 32)
    format, x = FORMATS["mxfp4"].fit(tensors), torch.ones(1, INPUTS, dtype=torch.bfloat16)
    for out in (torch.empty(1, OUTPUTS - 1, dtype=torch.bfloat16), torch.empty(2, OUTPUTS, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"of shape \[1, 80\]"):
            multiply_in_order(format, tensors, x, out, ORDERS[0])
    with pytest.raises(ValueError, match=r"\[80, 1536\]"):
        format.unpack(tensors, torch.empty(OUTPUTS, INPUTS - 32, dtype=torch.bfloat16))


SMALL = 2.0**-126  # float32 has no smaller number that is not denormal


def test_a_total_of_chunks_may_be_denormal():
    """Chunks are added by ordinary additions: 1.5 - 1 + 1 of the smallest numbers; in between, half of it."""
    x, matrix = torch.zeros(1, INPUTS).bfloat16(), torch.zeros(OUTPUTS, INPUTS).bfloat16()
    x[0, ::512], matrix[:, ::512] = 1, torch.tensor([1.5, -1, 1]).bfloat16() * SMALL
    out = torch.empty(1, OUTPUTS, dtype=torch.bfloat16)
    exact.multiplier()(x, matrix, out, paired=False, chunk=512)
    assert (out == 1.5 * SMALL).all()


@pytest.mark.parametrize("inputs", [512, 1024, INPUTS, 1568])  # whole chunks, and a part of one
@pytest.mark.parametrize("order", ORDERS)
def test_a_zero_has_the_sign_of_what_was_too_small(order, inputs):
    """The last product of each chunk is negative and too small: VDPBF16PS makes -0 of it, and -0 is what is left of the
    total. In pairs the sum of the odd inputs, which is 0, is added to it."""
    x, matrix = torch.zeros(1, inputs).bfloat16(), torch.zeros(OUTPUTS, inputs).bfloat16()
    last = [min(end, inputs) - 2 for end in range(order.chunk, inputs + order.chunk, order.chunk)]
    x[0, last], matrix[:, last] = SMALL, -0.5
    out = torch.empty(1, OUTPUTS, dtype=torch.bfloat16)
    exact.multiplier()(x, matrix, out, *order)
    assert (out == 0).all() and (out.signbit() != order.paired).all()
    codes = torch.full((OUTPUTS, inputs // 2), 0x88, dtype=torch.uint8)
    codes[:, [i // 2 for i in last]] = 0x87  # int4: -1, and above it 0
    tensors = codes.view(torch.int32), torch.full((OUTPUTS, inputs // 32), 0.5)
    assert multiply_in_order(FORMATS["int4"].fit(tensors), tensors, x, out, order)
    assert (out == 0).all() and (out.signbit() != order.paired).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_bias_may_be_denormal_and_no_result_is(order):
    x, matrix = torch.zeros(1, INPUTS).bfloat16(), torch.zeros(OUTPUTS, INPUTS).bfloat16()
    x[0, 0], matrix[: OUTPUTS // 2, 0] = 1, SMALL
    out, bias = torch.empty(1, OUTPUTS, dtype=torch.bfloat16), torch.full((OUTPUTS,), SMALL / 2).bfloat16()
    exact.multiplier()(x, matrix, out, *order, bias)
    assert out[0].tolist() == [1.5 * SMALL] * (OUTPUTS // 2) + [0] * (OUTPUTS // 2)
    assert (bias * 1).count_nonzero() == OUTPUTS, "this thread reads denormal numbers as before"


def test_what_is_no_number_has_torchs_bits_too():
    order = find_order(1, OUTPUTS, INPUTS, torch.bfloat16, turned=False)
    if order is None:
        pytest.skip("torch adds up in none of the known orders here")
    x, matrix = torch.ones(1, INPUTS).bfloat16(), torch.ones(OUTPUTS, INPUTS).bfloat16()
    x[0, :2], matrix[::2, 1] = float("inf"), -1  # infinity less infinity, every second time
    out = torch.empty(1, OUTPUTS, dtype=torch.bfloat16)
    exact.multiplier()(x, matrix, out, *order)
    assert torch.equal(out.view(torch.int16), torch.mm(x, matrix.t()).view(torch.int16))


def test_a_weight_that_rounds_up_from_a_denormal_number_is_left_to_unpacking():
    codes, scale = fp8(OUTPUTS, INPUTS, torch.full((1, 1), (2 - 2.0**-20) * SMALL))
    x, out = torch.ones(1, INPUTS).bfloat16(), torch.empty(1, OUTPUTS, dtype=torch.bfloat16)
    assert not multiply_in_order(FORMATS["fp8"].fit((codes, scale)), (codes, scale), x, out, ORDERS[0])


def test_a_trial_that_cannot_tell_orders_apart_finds_none(monkeypatch):
    zeros = torch.zeros(exact.FEW, INPUTS).bfloat16(), torch.zeros(OUTPUTS, INPUTS).bfloat16()
    monkeypatch.setattr(exact, "trials", lambda *_: [zeros])
    assert find_order(1, OUTPUTS, INPUTS, torch.bfloat16, turned=False) is None


def test_a_denormal_scale_is_left_to_unpacking():
    codes, scales = mxfp4(OUTPUTS, INPUTS // 32)
    scales = scales.clone()
    scales.view(torch.uint8)[79, 47] = 0  # 2^-127
    x, out = torch.ones(1, INPUTS).bfloat16(), torch.empty(1, OUTPUTS, dtype=torch.bfloat16)
    assert not multiply_in_order(FORMATS["mxfp4"].fit((codes, scales)), (codes, scales), x, out, ORDERS[0])
    codes, scale = fp8(OUTPUTS, INPUTS, torch.full((1, 1), 1e-39))
    assert not multiply_in_order(FORMATS["fp8"].fit((codes, scale)), (codes, scale), x, out, ORDERS[0])
