"""Products straight from the codes: nearer to exact arithmetic than bfloat16, the same for any number of threads."""

import pytest
import torch

from moe_offload.packed import FORMATS, fused
from moe_offload.packed.fused import multiply_fused
from tests.packed.matrices import E8M0, fp8, int4, mxfp4
from tests.packed.test_compiled import run_python

SCALE = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)) * 1e-2
MATRICES = {
    "mxfp4": mxfp4(100, 9),
    "fp8 blocks": fp8(128, 512, SCALE),
    "fp8 channels": fp8(70, 96, torch.rand(70, 1, generator=torch.Generator().manual_seed(2)).bfloat16()),
    "fp8 mx": fp8(64, 256, torch.full((64, 8), 120, dtype=torch.uint8).view(E8M0)),
    "fp8 odd": fp8(64, 40, torch.ones(1)),
    "int4": (
        int4(64, 256, 8, torch.bfloat16)[0],
        torch.rand(64, 8, generator=torch.Generator().manual_seed(3)).bfloat16(),
    ),
    "int4 of 16": (
        int4(64, 256, 16, torch.bfloat16)[0],
        torch.rand(64, 16, generator=torch.Generator().manual_seed(3)),
    ),
}


def products(name, tokens, dtype=torch.float32):
    """(fused, exact in float64) of one matrix."""
    tensors = MATRICES[name]
    format = FORMATS[name.split()[0]].fit(tensors)
    outputs, inputs = format.shape(tensors)
    weight = torch.empty(outputs, inputs, dtype=torch.float32)
    scale = (
        tensors[1].float() if name.startswith("int4") else tensors[1]
    )  # in its own dtype, weights are rounded to that
    format.unpack_torch((tensors[0], scale), weight)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    out = torch.full((tokens, outputs), 7.0, dtype=dtype)
    multiply_fused(format, tensors, x, out)
    return out, x.double() @ weight.double().t()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("name", MATRICES)
def test_a_product_is_that_of_the_weights_themselves(name, tokens, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(fused, "_load_kernels", lambda: None)
    found, exact = products(name, tokens)
    assert (found - exact).norm() < 1e-6 * exact.norm()


def test_the_result_is_rounded_once():
    found, exact = products("mxfp4", 2, torch.bfloat16)
    assert torch.equal(found, products("mxfp4", 2)[0].bfloat16()) and (found - exact).norm() < 4e-3 * exact.norm()


def test_sums_depend_on_no_number_of_threads():
    code = """
import torch
from moe_offload.packed.compiled import pool
from tests.packed.test_fused import MATRICES, products
pool.SMALL = 0
for name in MATRICES:
    torch.set_num_threads(1)
    one = products(name, 2)[0]
    torch.set_num_threads(3)
    assert torch.equal(products(name, 2)[0], one), name
"""
    run_python(code)


def test_a_processor_without_wide_vectors_computes_it_too(tmp_path):
    code = """
from tests.packed.test_fused import MATRICES, products
for name in MATRICES:
    found, exact = products(name, 1)
    assert (found - exact).norm() < 1e-6 * exact.norm(), name
"""
    run_python(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
