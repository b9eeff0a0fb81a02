"""Packed matrices with every code and every legal scale, and what plain transformers makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_offload.packed import FORMATS, FP8, MXFP4, Int4

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def codes_fp8(outputs: int, inputs: int) -> torch.Tensor:
    """Every code that means a number, many times."""
    codes = random_bytes(outputs, inputs)
    codes.view(-1)[:256] = torch.arange(256).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes.view(E4M3)


def floats(*shape: int, dtype: torch.dtype, spread: int = 30) -> torch.Tensor:
    """Numbers of every size, of both signs."""
    g = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=g) * torch.exp2(torch.randint(-spread, spread, shape, generator=g))).to(dtype)


def exponents(*shape: int) -> torch.Tensor:
    """Powers of two: every byte but 255, as often as there is room."""
    return torch.arange(torch.Size(shape).numel()).remainder(255).to(torch.uint8).view(shape)


def all_mxfp4() -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte of codes under every legal scale: 255 rows of sixteen groups."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    return codes, torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)


def plain_mxfp4(tensors, dtype):
    codes, scales = (tensor.view(torch.uint8) for tensor in tensors)
    codes = codes.view(1, *scales.shape, 16)
    return convert_moe_packed_tensors(codes, scales[None], dtype=dtype)[0].t()


def plain_fp8(tensors, dtype):
    return Fp8Dequantize(None)._dequantize_one(*tensors, output_dtype=dtype)


def plain_int4(tensors, dtype):
    """The formula of compressed-tensors, written down once more; `test_against_plain.py` asks the package itself."""
    codes, scale = tensors
    nibbles = torch.stack([(codes >> (4 * n)) & 15 for n in range(8)], -1).flatten(1) - 8
    return (nibbles.view(*scale.shape, -1).to(scale.dtype) * scale[..., None]).flatten(1).to(dtype)


def int4(outputs: int, inputs: int, groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return random_bytes(outputs, inputs // 2).view(torch.int32), floats(outputs, groups, dtype=dtype)


def mxfp4(outputs: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_bytes(outputs, groups, 16), random_bytes(outputs, groups, seed=2) % 20 + 110


def fp8(outputs: int, inputs: int, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return codes_fp8(outputs, inputs), scale


BF16, F32 = torch.bfloat16, torch.float32
#: Name -> the tensors of one matrix.
CASES = {
    "mxfp4 all codes, all scales": all_mxfp4(),
    "mxfp4 one group": mxfp4(33, 1),
    "mxfp4 many groups": mxfp4(100, 9),
    "mxfp4 as int8 [O, I/2]": (random_bytes(64, 48).view(torch.int8), exponents(64, 3).view(E8M0)),
    "fp8 blocks": fp8(256, 384, floats(2, 3, dtype=F32)),
    "fp8 odd blocks": fp8(60, 35, floats(3, 5, dtype=F32)),
    "fp8 small scales": fp8(256, 256, floats(2, 2, dtype=F32) * 1e-36),
    "fp8 blocks of bfloat16 scales": fp8(64, 64, floats(2, 2, dtype=BF16)),
    "fp8 blocks of e8m0 scales": fp8(512, 512, exponents(16, 16).view(E8M0)),
    "fp8 mx blocks of bytes": fp8(256, 256, exponents(256, 8)),
    "fp8 channels": fp8(70, 96, floats(70, 1, dtype=BF16)),
    "fp8 channels of float32": fp8(70, 33, floats(70, 1, dtype=F32)),
    "fp8 one scale": fp8(48, 50, torch.tensor([0.0123])),
    "fp8 one scale of no axis": fp8(48, 50, torch.tensor(-1.7)),
    "fp8 one row of blocks": fp8(48, 64, floats(1, 2, dtype=F32)),
    "int4 groups": int4(64, 256, 8, BF16),
    "int4 groups of 8": int4(40, 80, 10, BF16),
    "int4 groups of float32 scales": int4(64, 256, 2, F32),
    "int4 groups of float16 scales": (
        random_bytes(16, 32).view(torch.int32),
        floats(16, 2, dtype=F32, spread=4).half(),
    ),
    "int4 channels": int4(33, 72, 1, BF16),
}
PLAIN = {"mxfp4": plain_mxfp4, "fp8": plain_fp8, "int4": plain_int4}


def case(name: str) -> SimpleNamespace:
    """The tensors, their format, and what plain transformers says they are worth."""
    kind, tensors = name.split()[0], CASES[name]
    return SimpleNamespace(tensors=tensors, format=FORMATS[kind].fit(tensors), plain=PLAIN[kind])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


__all__ = ["CASES", "FP8", "MXFP4", "Int4", "case", "same_bits"]
