"""What is quantised unpacks to the nearest values, and quantised again gives the same tensors."""

import pytest
import torch

from moe_offload.errors import UnsupportedModelError
from moe_offload.packed import FORMATS
from moe_offload.packed.quantise import quantise_fp8, quantise_int4, quantise_mxfp4
from tests.packed.matrices import same_bits

QUANTISE = {"mxfp4": quantise_mxfp4, "fp8": quantise_fp8, "int4": quantise_int4}
#: Relative error of normal weights: a little above what these roundings give (0.117, 0.026, 0.093 were measured).
ERROR = {"mxfp4": 0.125, "fp8": 0.028, "int4": 0.1}


def unpacked(kind, tensors):
    format = FORMATS[kind].fit(tensors)
    out = torch.empty(format.shape(tensors), dtype=torch.bfloat16)
    format.unpack_torch(tensors, out)
    return out


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(256, 384, generator=g) * torch.exp2(torch.randint(-12, 3, (256, 1), generator=g))
    w[0], w[1, ::2], w[2, :32] = 0.0, 0.0, torch.linspace(-1, 1, 32)
    w[3, :32], w[4, 5] = -0.0, 30.0
    return w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", QUANTISE)
def test_what_was_rounded_once_stays(kind, dtype):
    tensors = QUANTISE[kind](weights().to(dtype))
    assert FORMATS[kind].fit(tensors).find_fault(tensors) is None
    again = QUANTISE[kind](unpacked(kind, tensors))
    for first, second in zip(tensors, again, strict=True):
        assert first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    assert same_bits(unpacked(kind, again), unpacked(kind, tensors))


@pytest.mark.parametrize("kind", QUANTISE)
def test_the_error_is_that_of_rounding(kind):
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(3))
    error = (unpacked(kind, QUANTISE[kind](w)).float() - w).norm() / w.norm()
    assert 0.5 * ERROR[kind] < error < ERROR[kind]


def test_each_weight_goes_to_the_nearest_value_of_mxfp4():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    blocks, scales = quantise_mxfp4(w)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([grid, -grid]) * torch.exp2(scales.float() - 127)[..., None]
    nearest = (w.view(64, 2, 32, 1) - grid[:, :, None]).abs().amin(-1)
    assert torch.equal((unpacked("mxfp4", (blocks, scales)).float().view(64, 2, 32) - w.view(64, 2, 32)).abs(), nearest)


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [("mxfp4", (8, 40), "groups of 32"), ("int4", (8, 40), "groups of 32"), ("fp8", (192, 128), "blocks of 128")],
)
def test_a_shape_that_cannot_be_cut_is_refused(kind, shape, words):
    with pytest.raises(UnsupportedModelError, match=words):
        QUANTISE[kind](torch.zeros(shape))


def test_other_groups_and_blocks():
    w = torch.randn(192, 256, generator=torch.Generator().manual_seed(5))
    assert quantise_fp8(w, block=64)[1].shape == (3, 4) and quantise_int4(w, group=256)[1].shape == (192, 1)
