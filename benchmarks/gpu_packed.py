"""A section of gpu_checks.py: products with packed rows, whether they are right, and as fast as with bfloat16 rows.

Shapes: P token-expert pairs, S slots, M rows of one matrix and H its columns, B bytes of a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_timing import graph
from torch import Tensor

from moe_offload.apps.bench.roofs.link import measure_us
from moe_offload.experts import RowCodes
from moe_offload.runtime.kernels import KERNELS
from moe_offload.runtime.kernels.packed import reference

Say = Callable[..., None]
#: name, matrices, M of one, H, scale's dtype, rows and columns of a scale
FORMATS = (
    ("mxfp4", 1, 5760, 2880, torch.uint8, (1, 32)),
    ("fp8", 2, 768, 2048, torch.float32, (128, 128)),
    ("int4", 2, 768, 2048, torch.bfloat16, (1, 32)),
)
MANY = 512  # pairs, of 8 experts


def compare(options: argparse.Namespace, say: Say) -> None:
    for name, matrices, rows, hidden, scale_dtype, block in FORMATS:
        if options.tiny:  # in float32: the interpreter cuts bfloat16 off
            rows, hidden, block = 16, 64, (min(block[0], 16), min(block[1], 32))
            scale_dtype = scale_dtype if name == "mxfp4" else torch.float32
        dtype = torch.float32 if options.tiny else torch.bfloat16
        codes = describe(name, matrices, rows, hidden, scale_dtype, block, dtype)
        _compare_format(f"{name} {codes.rows}x{hidden}", codes, options, say)


def describe(
    name: str,
    matrices: int,
    rows: int,
    hidden: int,
    scale_dtype: torch.dtype,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> RowCodes:
    code_bytes, grid = rows * hidden // (1 if name == "fp8" else 2), (rows // block[0], hidden // block[1])
    step = -(-(code_bytes + grid[0] * grid[1] * scale_dtype.itemsize) // 64) * 64
    of_scale = scale_dtype.itemsize
    return RowCodes(
        name, rows, hidden, matrices, 0, step, code_bytes // of_scale, step // of_scale, grid, scale_dtype,
        dtype,
    )  # fmt: skip


def random_rows(codes: RowCodes, slots: int) -> Tensor:
    """Any codes that mean numbers, under scales that keep sums finite."""
    nbytes = -(-codes.matrices * codes.codes_step // 4096) * 4096
    rows_SB = torch.randint(0, 0x7F, (slots, nbytes), dtype=torch.uint8)
    count, size = codes.grid[0] * codes.grid[1], codes.scale_dtype.itemsize
    for i in range(codes.matrices):
        at = (codes.scales_at + i * codes.scales_step) * size
        scales = torch.randint(115, 122, (slots, count), dtype=torch.uint8)
        if size > 1:
            scales = torch.rand(slots, count).mul(0.02).to(codes.scale_dtype).view(torch.uint8)
        rows_SB[:, at : at + count * size] = scales
    return rows_SB


def _compare_format(name: str, codes: RowCodes, options: argparse.Namespace, say: Say) -> None:
    kernels, device, pairs = KERNELS["cuda"](), options.device, 2 if options.tiny else 8
    sets = 2 if options.tiny else 4  # of slots, taken in turn: the second-level cache must not hold them
    rows_SB = random_rows(codes, sets * pairs)
    weight_SMH = torch.cat([reference.unpack_rows(row[None], codes) for row in rows_SB]).to(device)
    rows_SB, slots = rows_SB.to(device), torch.randperm(sets * pairs).view(sets, pairs).to(device)

    columns = torch.arange(0, codes.inputs, max(1, codes.inputs // (4 if options.tiny else 64)))
    one_hot, same = torch.eye(codes.inputs, dtype=codes.dtype)[columns].to(device), slots[0, 0].repeat(len(columns))
    for what, product in (("few", kernels.packed_indexed_mm), ("many", kernels.packed_grouped_mm)):
        got = product(one_hot, rows_SB, same, codes)
        right = torch.equal(got, weight_SMH[same[0]][:, columns.to(device)].T)
        say("packed", f"{name}, {what}: columns are the CPU's numbers", right, "")

    x_PH = torch.randn(pairs, codes.inputs, dtype=codes.dtype, device=device)
    bf16_bytes = pairs * codes.rows * codes.inputs * 2

    def report(what: str, multiply: Callable[[Tensor], Any]) -> float:
        run = graph([partial(multiply, slots_P) for slots_P in slots], device)
        taken = measure_us(run, device) / sets
        say("packed", f"{name} P={pairs}, {what}", taken, "us", gb_s_of_bf16=round(bf16_bytes / taken / 1e3))
        return taken

    report("bfloat16 rows", lambda slots_P: kernels.indexed_mm(x_PH, weight_SMH, slots_P))
    report("packed rows", lambda slots_P: kernels.packed_indexed_mm(x_PH, rows_SB, slots_P, codes))
    report("packed rows, gated", lambda slots_P: kernels.packed_gated_mm(x_PH, rows_SB, slots_P, codes))
    if not options.tiny:
        x_PH = torch.randn(MANY, codes.inputs, dtype=torch.bfloat16, device=device)
        slots_P = torch.arange(8, device=device).repeat_interleave(MANY // 8)
        for what, run in (
            ("bfloat16 rows", partial(kernels.grouped_mm, x_PH, weight_SMH.transpose(1, 2), slots_P)),
            ("packed rows", partial(kernels.packed_grouped_mm, x_PH, rows_SB, slots_P, codes)),
        ):
            say("packed", f"{name} P={MANY}, {what}", measure_us(run, device), "us")
