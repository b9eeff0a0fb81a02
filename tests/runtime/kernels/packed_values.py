"""A kernel that unpacks every code of a list under every scale of another; a file that has Triton's decorator."""

import triton
import triton.language as tl

from moe_offload.runtime.kernels.packed.unpack_triton import unpack, unpack_wide, widen_scale


@triton.jit
def unpack_all(
    codes,
    scales,
    out,
    N,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    TYPE: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, CODES)
    scale = widen_scale(tl.load(scales + n, mask=n < N, other=0))[:, None]
    code = tl.load(codes + c)[None, :]
    if WIDE:
        value = unpack_wide(code, scale, FORMAT, SCALE_TYPE, TYPE).to(TYPE)
    else:
        value = unpack(code, scale, FORMAT, SCALE_TYPE, TYPE)
    tl.store(out + n[:, None] * CODES + c[None, :], value, mask=(n < N)[:, None])
