"""Quantising is the opposite of unpacking, as near as the format's codes allow."""

import pytest
import torch

from moe_offload.packed import FORMATS
from moe_offload.packed.mxfp4 import VALUES
from moe_offload.packed.quantise import quantise_fp8, quantise_int4, quantise_mxfp4

BF16, F32 = torch.bfloat16, torch.float32
#: Name -> what quantises, and the largest error that rounding can make, in shares of a group's largest number.
KINDS = {
    "mxfp4": (quantise_mxfp4, 1 / 4 + 1e-6),  # codes 4 and 6 with the largest at 4; or 8 cut to 6
    "int4": (quantise_int4, 1 / 13),
    "fp8": (quantise_fp8, 1 / 28 + 1e-6),  # codes 416 and 448
}


def unpack(kind, tensors, dtype=F32):
    found = FORMATS[kind].fit(tensors)
    out = torch.empty(found.shape(tensors), dtype=dtype)
    found.unpack_torch(tensors, out)
    return out


def matrix(outputs=256, inputs=384, dtype=F32, seed=0):
    """Numbers of every size from row to row."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn((outputs, inputs), generator=g) * torch.logspace(-6, 4, outputs)[:, None]).to(dtype)


def peaks(w, kind):
    if kind == "fp8":
        blocks = w.abs().view(w.shape[0] // 128, 128, w.shape[1] // 128, 128).amax((1, 3), keepdim=True)
        return blocks.expand(-1, 128, -1, 128).reshape(w.shape)
    return w.abs().view(w.shape[0], -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32).reshape(w.shape)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_rounding(kind, dtype):
    quantise, bound = KINDS[kind]
    w = matrix(dtype=dtype)
    tensors = quantise(w)
    assert FORMATS[kind].fit(tensors).find_fault(tensors) is None
    assert ((unpack(kind, tensors) - w.float()).abs() <= bound * peaks(w.float(), kind)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_once_is_packed_the_same_again(kind):
    """In float32, where unpacking rounds nothing; the worth of each number stays, to the bit."""
    quantise, _ = KINDS[kind]
    once = unpack(kind, quantise(matrix().sign() * matrix().abs().log2().round().exp2()))
    assert torch.equal(unpack(kind, quantise(once)), once)


def test_every_mxfp4_code_and_scale_comes_back():
    """Both signs of zero too; of scale 253 the code 6 would be too much for float32."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(253, 2)
    tensors = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(253, 1, 16), torch.arange(253, dtype=torch.uint8)[:, None]
    found = quantise_mxfp4(unpack("mxfp4", tensors))
    assert torch.equal(found[0], tensors[0]) and torch.equal(found[1], tensors[1])


def test_full_int4_groups_come_back():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 64), generator=g, dtype=torch.uint8)
    codes[:, ::16] = 0x80  # of each group the first two are -8 and 0
    tensors = codes.view(torch.int32), torch.rand((64, 4), generator=g).add(0.1).to(BF16).float()
    found = quantise_int4(unpack("int4", tensors))
    assert torch.equal(found[0], tensors[0]) and torch.equal(found[1], tensors[1])


def test_full_fp8_blocks_come_back():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    codes[(codes & 0x7F) == 0x7F] = 0
    tensors = codes.view(torch.float8_e4m3fn), torch.tensor([[1.0, 0.5], [2.0**-9, 4.0]])
    found = quantise_fp8(unpack("fp8", tensors))
    assert torch.equal(found[0].view(torch.uint8), codes) and torch.equal(found[1], tensors[1])


def test_mxfp4_rounds_half_way_to_the_even_code():
    half_way = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(1, 4)
    assert unpack("mxfp4", quantise_mxfp4(half_way))[0, :8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_has_the_nearest_code_of_its_group(kind):
    quantise, _ = KINDS[kind]
    w = matrix(seed=3)
    codes, scales = quantise(w)
    one = unpack(kind, (codes, scales))
    steps = {"mxfp4": torch.tensor(VALUES), "int4": torch.arange(-8.0, 8)}.get(kind)
    if steps is None:
        steps = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        steps = steps[~steps.isnan()]
        by = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        scales = torch.exp2(scales.float() - 127) if kind == "mxfp4" else scales
        by = scales.float().repeat_interleave(32, 1)
    for row in range(0, len(w), 51):
        all_there_are = steps[:, None] * by[row]
        torch.testing.assert_close((one[row] - w[row]).abs(), (all_there_are - w[row]).abs().amin(0))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_zeros(kind):
    tensors = KINDS[kind][0](torch.zeros(128, 128, dtype=BF16))
    assert not unpack(kind, tensors).any() and FORMATS[kind].fit(tensors).find_fault(tensors) is None
