"""int4, FP8 and MXFP4 of compressed-tensors are worth what that package makes of them, where it is installed."""

import pytest
import torch

from moe_offload.packed import FORMATS
from tests.packed.matrices import CASES, E8M0, same_bits

pytest.importorskip("compressed_tensors", reason="the package of the format")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme


def decompressed(form: str, state: dict[str, torch.Tensor], **arguments) -> torch.Tensor:
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **arguments))
    return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]


def unpacked(name: str, dtype: torch.dtype) -> torch.Tensor:
    tensors = CASES[name]
    format = FORMATS[name.split()[0]].fit(tensors)
    out = torch.empty(format.shape(tensors), dtype=dtype)
    format.unpack(tensors, out)
    return out


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("int4")])
def test_int4(name):
    codes, scale = CASES[name]
    shape = torch.tensor([codes.shape[0], codes.shape[1] * 8])
    group = {"strategy": "group", "group_size": int(shape[1]) // scale.shape[1]}
    how = group if scale.shape[1] > 1 else {"strategy": "channel"}
    state = {"weight_packed": codes, "weight_scale": scale, "weight_shape": shape}
    found = decompressed("pack-quantized", state, num_bits=4, type="int", **how)
    assert same_bits(found, unpacked(name, scale.dtype))


def test_mxfp4():
    codes, scales = CASES["mxfp4 as int8 [O, I/2]"]
    assert scales.dtype == E8M0
    state = {"weight_packed": codes.view(torch.uint8), "weight_scale": scales.view(torch.uint8)}
    found = decompressed("mxfp4-pack-quantized", state, num_bits=4, type="float", strategy="group", group_size=32)
    assert same_bits(found, unpacked("mxfp4 as int8 [O, I/2]", torch.bfloat16))


def test_mxfp4_under_every_scale():
    codes, scales = CASES["mxfp4 all codes, all scales"]
    state = {"weight_packed": codes.flatten(1), "weight_scale": scales}
    found = decompressed("mxfp4-pack-quantized", state, num_bits=4, type="float", strategy="group", group_size=32)
    assert same_bits(found, unpacked("mxfp4 all codes, all scales", torch.bfloat16))
