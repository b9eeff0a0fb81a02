"""A product by a packed matrix has the bits of the product by the whole one, in strips or not."""

import pytest
import torch

from moe_offload.packed import FORMATS, multiply
from moe_offload.packed.multiply import multiply_packed, strip_rows, strips_are_exact, transposed_is_exact
from tests.packed.matrices import fp8, int4, mxfp4, same_bits

MATRICES = {
    "mxfp4": mxfp4(700, 9),
    "fp8": fp8(768, 512, torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) * 1e-2),
    "int4": int4(520, 256, 8, torch.bfloat16),
}


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr(multiply, "STRIP", 1 << 15)
    monkeypatch.setattr(multiply, "_found", {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("exact", [None, False])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_bits_are_those_of_the_whole_product(kind, tokens, exact, dtype, monkeypatch):
    """`exact`: as it is here, or as on a processor where strips are something else."""
    if exact is not None:
        monkeypatch.setattr(multiply, "strips_are_exact", lambda *_: exact)
    tensors = MATRICES[kind]
    format = FORMATS[kind].fit(tensors)
    outputs, inputs = format.shape(tensors)
    whole = torch.empty(outputs, inputs, dtype=dtype)
    format.unpack_torch(tensors, whole)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    out = torch.full((tokens, outputs), 7.0, dtype=dtype)
    multiply_packed(format, tensors, x, out, torch.empty(outputs * inputs + 5, dtype=dtype))
    assert same_bits(out, torch.mm(x, whole.t()))


def test_strips_are_used_only_where_their_bits_are_those_of_the_whole(monkeypatch):
    """With a product that rounds otherwise by shape, the trial says no, and says it once."""
    asked = []

    def mm(x, weight, *, out=None):
        asked.append(tuple(weight.shape))
        found = x @ weight + (weight.shape[1] < 700) * 1e-3
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(multiply.torch, "mm", mm)
    assert not strips_are_exact(700, 288, torch.float32, 64)
    times = len(asked)
    assert not strips_are_exact(700, 288, torch.float32, 64) and len(asked) == times
    assert strips_are_exact(640, 288, torch.float32, 640), "one strip is the whole"


def test_a_transposed_view_is_tried_for_every_number_of_tokens(monkeypatch):
    tried = []
    same = multiply._same_bits
    monkeypatch.setattr(multiply, "_same_bits", lambda a, b: tried.append(a.shape[0]) or same(a, a))
    assert transposed_is_exact(96, 64, torch.bfloat16) and tuple(tried) == multiply.TOKENS
    monkeypatch.setattr(multiply, "_same_bits", lambda a, b: a.shape[0] != 17)
    assert not transposed_is_exact(160, 64, torch.bfloat16)


def test_a_strip_cuts_no_block():
    tensors = MATRICES["fp8"]
    assert strip_rows(FORMATS["fp8"].fit(tensors), 512) == 128
    assert strip_rows(FORMATS["fp8"].fit((tensors[0], torch.ones(16, 1))), 512) == 192  # of 48 rows and of 64
    assert strip_rows(FORMATS["mxfp4"].fit(MATRICES["mxfp4"]), 288) == 64


def test_a_trial_writes_where_it_may():
    scratch = torch.zeros(128, 64, dtype=torch.bfloat16)
    strips_are_exact(128, 64, torch.bfloat16, 64, scratch)
    assert bool(scratch.any())
