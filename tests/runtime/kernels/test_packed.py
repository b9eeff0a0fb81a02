"""Products with packed weights: every code under every kind of scale is the very number that the CPU unpacks, and the
products keep the contract of the plain ones. The Triton kernels only where they can run (see `test_contract.py`)."""

from __future__ import annotations

import pytest
import torch

from moe_offload.checkpoint.conversion import Join, Swap
from moe_offload.checkpoint.quantised.weights import Matrix, MatrixWeight
from moe_offload.experts import RowLayout
from moe_offload.forward.graphs.products import packed_products
from moe_offload.packed import FORMATS, mxfp4
from moe_offload.packed import fp8 as fp8_format
from moe_offload.packed import int4 as int4_format
from moe_offload.runtime.kernels import KERNELS
from moe_offload.runtime.kernels.packed import reference
from passes import ops
from tests.fakes.fake_device import Fabric, Far
from tests.packed.matrices import CASES, E4M3, E8M0, floats, fp8, int4, random_bytes
from tests.runtime.kernels.test_contract import INTERPRETED, bits, entry, round_bfloat16  # noqa: F401

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

LEAST = 1000 * torch.finfo(F32).tiny  # where products are subnormal, a CPU's own kernels may call them zero


def modest(*shape):
    """Exponents with which sums are finite."""
    return random_bytes(*shape, seed=2) % 20 + 110


#: Small matrices, for the interpreter is slow: columns that end within a tile, runs of one scale short and long.
PRODUCTS = {
    "mxfp4": (random_bytes(9, 9, 16), modest(9, 9)),
    "mxfp4, one group": (random_bytes(6, 1, 16), modest(6, 1)),
    "mxfp4 as int8 [O, I/2]": (random_bytes(10, 48).view(torch.int8), modest(10, 3).view(E8M0)),
    "fp8 blocks": fp8(32, 288, floats(2, 9, dtype=F32)),
    "fp8 odd blocks": fp8(12, 35, floats(3, 5, dtype=F32)),
    "fp8 blocks of bfloat16 scales": fp8(16, 64, floats(2, 2, dtype=BF16)),
    "fp8 blocks of e8m0 scales": fp8(16, 64, modest(4, 4).view(E8M0)),
    "fp8 mx blocks of bytes": fp8(6, 256, modest(6, 8)),
    "fp8 channels of float32": fp8(9, 33, floats(9, 1, dtype=F32)),
    "fp8 channels": fp8(7, 96, floats(7, 1, dtype=BF16)),
    "fp8 one scale": fp8(6, 58, torch.tensor([0.0123])),
    "int4 groups": int4(9, 256, 8, BF16),
    "int4 groups of 8": int4(8, 80, 10, BF16),
    "int4 groups of float32 scales": int4(6, 256, 2, F32),
    "int4 groups of float16 scales": (random_bytes(6, 32).view(torch.int32), floats(6, 2, dtype=F32, spread=4).half()),
    "int4 channels": int4(5, 72, 1, BF16),
}


def weight_of(tensors, dtype=BF16, matrices=2):
    """That matrix and as many like it, one below the other, as one parameter; and how its rows are laid out."""
    kind = {torch.uint8: "mxfp4", torch.int8: "mxfp4", torch.int32: "int4", E4M3: "fp8"}[tensors[0].dtype]
    made = FORMATS[kind].fit(tensors)
    parts = [(f"{i} {role}", tensor) for i in range(matrices) for role, tensor in zip("cs", tensors, strict=True)]
    layout = RowLayout.in_order((name, tuple(tensor.shape), tensor.dtype) for name, tensor in parts)
    outputs, inputs = made.shape(tensors)
    found = [Matrix(made, layout.fields[2 * i : 2 * i + 2], (outputs, inputs)) for i in range(matrices)]
    return MatrixWeight("w", (matrices * outputs, inputs), dtype, tuple(found), (Join(0),)), layout


def packed_rows(tensors, slots, dtype=BF16):
    """Rows [S, B], each with that matrix and one like it below; their `RowCodes`; and the weights [S, M, H]."""
    weight, layout = weight_of(tensors, dtype)
    rows_SB = torch.full((slots, layout.row_bytes), 0xFF, dtype=torch.uint8)
    values_SMH = torch.empty(slots, *weight.shape, dtype=dtype)
    for s, row in enumerate(rows_SB):
        for i, field in enumerate(layout.fields):
            field.view_in(row).copy_(rolled(tensors[i % 2], 3 * s + i // 2))
        weight.unpack(row, values_SMH[s])
    codes = weight.row_codes(True)
    assert codes is not None
    return rows_SB, codes, values_SMH


def rolled(tensor, n):
    raw = tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())
    return raw.roll(n, 0).view(-1).view(tensor.dtype).view(tensor.shape)


def assert_close(out_PM, x_PH, weight_PMH, dtype):
    terms_PMH = weight_PMH.double() * x_PH.double().unsqueeze(1)
    want_PM, size_PM = terms_PMH.sum(-1), terms_PMH.abs().sum(-1)
    assert out_PM.dtype == dtype and out_PM.shape == want_PM.shape
    bound_PM = torch.finfo(dtype).eps * want_PM.abs() + 20 * torch.finfo(F32).eps * size_PM + LEAST
    assert ((out_PM.double() - want_PM).abs() <= bound_PM).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_the_reference_unpacks_as_the_cpu_does(name, dtype):
    rows_SB, codes, values_SMH = packed_rows(CASES[name], 2, dtype)
    got_SMH = reference.unpack_rows(rows_SB, codes)
    assert torch.equal(got_SMH.view(torch.uint8), values_SMH.view(torch.uint8))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", PRODUCTS)
def test_few_pairs(entry, name, dtype):  # noqa: F811
    rows_SB, codes, values_SMH = packed_rows(PRODUCTS[name], 3, dtype)
    generator = torch.Generator().manual_seed(0)
    slots_P = torch.tensor([2, 0, 2])
    x_PH = torch.randn(3, codes.inputs, generator=generator).to(dtype)
    given = [x.to(entry.device) for x in (x_PH, rows_SB, slots_P)]
    assert_close(entry.kernels.packed_indexed_mm(*given, codes).cpu(), x_PH, values_SMH[slots_P], dtype)


@pytest.mark.parametrize("name", ["mxfp4", "fp8 odd blocks", "int4 groups of 8"])
def test_numbers_of_x_that_do_not_lie_together(entry, name):  # noqa: F811
    """One token for all pairs, every other column of a wider tensor, and rows that begin at an odd number."""
    rows_SB, codes, values_SMH = packed_rows(PRODUCTS[name], 3)
    slots_P = torch.tensor([[2, 0, 1], [1, 1, 1]]).T[:, 0]
    wide = torch.randn(3, 2 * codes.inputs, generator=torch.Generator().manual_seed(0)).to(BF16)
    odd = torch.randn(3, codes.inputs + 1, generator=torch.Generator().manual_seed(1)).to(BF16)
    for x_PH in (wide[:1, : codes.inputs].expand(3, -1), wide[:, ::2], odd[:, 1:], odd[1:, :-1]):
        slots_P = slots_P[: len(x_PH)]
        for product in (entry.kernels.packed_indexed_mm, entry.kernels.packed_grouped_mm):
            got = product(x_PH.to(entry.device), rows_SB.to(entry.device), slots_P.to(entry.device), codes).cpu()
            assert_close(got, x_PH, values_SMH[slots_P], BF16)


@pytest.mark.parametrize(
    "name", ["mxfp4, one group", "mxfp4", "fp8 blocks of bfloat16 scales", "fp8 channels", "int4 groups of 8"]
)
def test_a_product_with_one_column_is_that_column(entry, name):  # noqa: F811
    """Nothing is added up: the number itself, to the bit, from its place."""
    rows_SB, codes, values_SMH = packed_rows(PRODUCTS[name], 1)
    columns = list(range(0, codes.inputs, 7))
    x_PH = torch.eye(codes.inputs)[columns].to(BF16)
    given = (
        x_PH.to(entry.device),
        rows_SB.to(entry.device),
        torch.zeros(len(columns), dtype=torch.int64).to(entry.device),
    )
    for product in (entry.kernels.packed_indexed_mm, entry.kernels.packed_grouped_mm):
        assert torch.equal(product(*given, codes).cpu(), values_SMH[0][:, columns].T)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", ["mxfp4", "fp8 channels", "int4 channels"])
def test_gated(entry, name, dtype):  # noqa: F811
    rows_SB, codes, _ = packed_rows(PRODUCTS[name], 2, dtype)
    x_PH = torch.randn(2, codes.inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = [x.to(entry.device) for x in (x_PH * 2.0**-24, rows_SB, torch.tensor([1, 0]))]
    out_PI = entry.kernels.packed_gated_mm(*given, codes)
    gate_PI, up_PI = entry.kernels.packed_indexed_mm(*given, codes).double().chunk(2, dim=-1)
    want_PI = torch.nn.functional.silu(gate_PI) * up_PI
    roundings = 1.5 if entry.kernels.packed_gated_mm is reference.gated_mm else 0.5
    bound_PI = (roundings * torch.finfo(dtype).eps + 4 * torch.finfo(F32).eps) * want_PI.abs() + LEAST
    assert want_PI.abs().max() > 0 and ((out_PI.double() - want_PI).abs() <= bound_PI).all()


def test_no_pairs(entry):  # noqa: F811
    rows_SB, codes, _ = packed_rows(PRODUCTS["int4 groups"], 2)
    x_PH, slots_P = torch.zeros(0, codes.inputs, dtype=BF16), torch.zeros(0, dtype=torch.int64)
    given = [x.to(entry.device) for x in (x_PH, rows_SB, slots_P)]
    for product in (entry.kernels.packed_indexed_mm, entry.kernels.packed_grouped_mm):
        assert product(*given, codes).shape == (0, codes.rows)
    assert entry.kernels.packed_gated_mm(*given, codes).shape == (0, codes.rows // 2)


RUNS = {"a tile and one more": [(0, 65)], "any order": [(2, 3), (0, 70), (1, 1), (2, 2)]}


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, BF16) for name in PRODUCTS] + [("int4 groups", F32), ("fp8 blocks", F32)]
)
def test_many_pairs(entry, name, dtype, runs):  # noqa: F811
    rows_SB, codes, values_SMH = packed_rows(PRODUCTS[name], 3, dtype)
    slots_P = torch.tensor([slot for slot, count in RUNS[runs] for _ in range(count)])
    x_PH = torch.randn(len(slots_P), codes.inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = [x.to(entry.device) for x in (x_PH, rows_SB, slots_P)]
    assert_close(entry.kernels.packed_grouped_mm(*given, codes).cpu(), x_PH, values_SMH[slots_P], dtype)


def test_a_matrix_that_rests_the_other_way_round():
    """Of stacked MXFP4 the parameter [H, O] is the transpose of what lies in the file: x @ W reads its rows."""
    layout = RowLayout.in_order([("c", (64, 3, 16), torch.uint8), ("s", (64, 3), torch.uint8)])
    matrix = Matrix(FORMATS["mxfp4"].fit(PRODUCTS["mxfp4"]), layout.fields, (64, 96))
    turned = MatrixWeight("w", (96, 64), BF16, (matrix,), (Swap(0, 1),))
    joined = MatrixWeight("w", (64, 96), BF16, (matrix,), ())
    assert turned.row_codes(False) == joined.row_codes(True) != None  # noqa: E711
    assert turned.row_codes(True) is None and joined.row_codes(False) is None


def test_what_does_not_fit_is_refused(entry):  # noqa: F811
    if entry.kernels.packed_indexed_mm is reference.indexed_mm:
        pytest.skip("torch's own errors")
    rows_SB, codes, _ = packed_rows(PRODUCTS["int4 groups"], 2)
    x_PH, slots_P = torch.zeros(2, codes.inputs, dtype=BF16), torch.zeros(2, dtype=torch.int64)
    for x, rows, slots in (
        (x_PH[:, 1:], rows_SB, slots_P),
        (x_PH.float(), rows_SB, slots_P),
        (x_PH, rows_SB, slots_P[1:]),
    ):
        for product in (entry.kernels.packed_indexed_mm, entry.kernels.packed_grouped_mm):
            with pytest.raises(ValueError, match="do not fit packed weights"):
                product(x, rows, slots, codes)


# The ops of a GPU, on a device that says who waits for it


@pytest.mark.parametrize("name", ["mxfp4", "fp8 blocks", "int4 groups"])
@pytest.mark.parametrize("readable", [True, False])
def test_the_host_is_asked_only_for_what_kernels_cannot_read(name, readable, monkeypatch):
    rows_SB, codes, values_SMH = packed_rows(PRODUCTS[name], 3)
    monkeypatch.setattr(ops, "_PACKED", [weight_of(PRODUCTS[name])[0]])
    if not readable:
        monkeypatch.setattr(MatrixWeight, "row_codes", lambda self, transposed: None)
    products, slots_P = packed_products(KERNELS["cpu"]()), torch.tensor([2, 2, 0, 1])
    x_PH = torch.randn(4, codes.inputs, generator=torch.Generator().manual_seed(0)).to(BF16)
    x, rows, slots = (Far(given) for given in (x_PH, rows_SB, slots_P))
    tables = [mxfp4._pairs, fp8_format._values, int4_format._pairs]
    try:
        with Fabric():
            products["unpack"](rows, slots, 0)  # its table goes to a device once
        with Fabric() as fabric:
            unpacked = products["unpack"](rows, slots, 0)
            assert fabric.waits == []
            product = products["packed_mm"](x, rows, slots, 0, True)
            assert (fabric.waits == []) == readable
    finally:
        for table in tables:
            table.cache_clear()
    assert torch.equal(bits(unpacked.near), bits(values_SMH[slots_P]))
    assert_close(product.near, x_PH, values_SMH[slots_P], BF16)


# Every code under every kind of scale


SCALES = {
    "all bfloat16": torch.arange(1 << 16).to(torch.uint16).view(BF16),
    "all float16": torch.arange(1 << 16).to(torch.uint16).view(F16),
    "all exponents": torch.arange(256).to(torch.uint8),
    "all exponents, as such": torch.arange(256).to(torch.uint8).view(E8M0),
    "float32": torch.cat(
        [
            floats(4096, dtype=F32, spread=60),
            torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38]),
            torch.arange(0, 1 << 31, 1 << 20).to(torch.int32).view(F32),  # every exponent
            torch.exp2(torch.arange(-149.0, 128.0)) * 1.9999999,
        ]
    ),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(
    ("kind", "scales"),
    [
        ("mxfp4", "all exponents"),
        ("mxfp4", "all exponents, as such"),
        ("fp8", "float32"),
        ("fp8", "all bfloat16"),
        ("fp8", "all float16"),
        ("fp8", "all exponents"),
        ("int4", "all bfloat16"),
        ("int4", "all float16"),
        ("int4", "float32"),
    ],
)
def test_every_code_under_every_kind_of_scale_is_the_cpus_number(kind, scales, dtype, device):
    if (device == "cpu") != INTERPRETED or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip("needs TRITON_INTERPRET=1 on a CPU, or a GPU")
    if INTERPRETED:
        round_bfloat16()
    scale_N, every = SCALES[scales], torch.arange(256 if kind == "fp8" else 16)
    if kind == "fp8" and scales in ("all bfloat16", "all float16"):
        scale_N = torch.cat([scale_N[::17], scale_N[:130], scale_N[-130:]])  # 256 codes each
    tensors = [codes_of(kind, every, len(scale_N)), scale_N[:, None]]
    want = torch.empty(len(scale_N), 32 if kind == "mxfp4" else len(every), dtype=dtype)
    FORMATS[kind].fit(tensors).unpack_torch(tensors, want)
    want = want[:, : len(every)].contiguous()
    nan = want.isnan()
    for wide in (False, True):
        got = values(kind, every, scale_N, dtype, wide, device)
        assert got.shape == want.shape and torch.equal(got.isnan(), nan)
        assert torch.equal(*(bits(x.masked_fill(nan, 0)) for x in (got, want)))


def codes_of(kind, every, rows):
    """The codes 0, 1, 2 ... of a row, as each format packs them."""
    if kind == "fp8":
        return every.to(torch.uint8).view(E4M3).repeat(rows, 1)
    pairs = (every[::2] | (every[1::2] << 4)).to(torch.uint8).repeat(rows, 1)
    return pairs.repeat(1, 2) if kind == "mxfp4" else pairs.view(torch.int32)


def values(kind, code_C, scale_N, dtype, wide, device):
    """What a kernel that does nothing else makes of every code under every scale."""
    from moe_offload.runtime.kernels.packed.unpack_triton import AS_LOADED, FORMATS, TYPES, tl
    from tests.runtime.kernels.packed_values import unpack_all

    raw_N = scale_N.view(AS_LOADED.get(scale_N.dtype, scale_N.dtype)).to(device)
    out = torch.empty(len(raw_N), len(code_C), dtype=dtype, device=device)
    rows = 4096 if INTERPRETED else 4096 // len(code_C)
    unpack_all[(-(-len(raw_N) // rows),)](
        code_C.to(device, torch.int32), raw_N, out, len(raw_N), CODES=len(code_C), BLOCK=rows, WIDE=wide,
        FORMAT=FORMATS[kind], SCALE_TYPE=TYPES.get(scale_N.dtype, tl.float32), TYPE=TYPES[dtype],
    )  # fmt: skip
    return out.cpu()
