"""`gather` as one Triton kernel: the device itself reads the missing rows out of pinned host memory.

Shapes: P token-expert pairs, E experts, S slots, N elements of one row.

The grid is fixed and the number of rows is read on the device, so a captured graph copies what each launch finds
missing, and one without misses costs an empty kernel. The chunks of all rows are dealt out in turn: a program has
at most one more than any other, however large the rows are.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .staging.state import CHUNK, PROGRAMS, words_of
from .state import Loads

WARPS = 8


def gather(rows_EN: Tensor, bank_SN: Tensor, loads: Loads, programs: int = PROGRAMS) -> None:
    """Copy the rows of `loads` from host memory into their slots; entries after the count are not touched.

    `rows_EN`: a tensor that the device can read, such as a CUDA view of pinned memory. Rows are whole and multiples of
    16 bytes; they begin at multiples of 16 bytes, or are copied more slowly.
    """
    words_EN, words_SN = words_of(rows_EN), words_of(bank_SN)
    if words_EN.shape[1] != words_SN.shape[1]:
        raise ValueError(f"rows of {8 * words_EN.shape[1]} bytes do not fit slots of {8 * words_SN.shape[1]} bytes")
    _gather[(programs,)](
        words_EN,
        words_SN,
        loads.expert_P,
        loads.slot_P,
        loads.count_1,
        words_EN.shape[1],
        words_EN.stride(0),
        words_SN.stride(0),
        PROGRAMS=programs,
        CHUNK=CHUNK,
        num_warps=WARPS,
    )


@triton.jit
def _gather(
    rows_EN,
    bank_SN,
    expert_P,
    slot_P,
    count_1,
    words,
    row_stride,
    slot_stride,
    PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(words, CHUNK)  # of one row
    for i in range(tl.program_id(0), tl.load(count_1) * chunks, PROGRAMS):
        p = i // chunks
        row = rows_EN + tl.load(expert_P + p).to(tl.int64) * row_stride
        slot = bank_SN + tl.load(slot_P + p).to(tl.int64) * slot_stride
        word = (i - p * chunks) * CHUNK + tl.arange(0, CHUNK)
        inside = word < words
        # What came over the link is not read again; the slot is, and soon. (`.cg` too would be refused by ptxas.)
        values = tl.load(row + word, mask=inside, eviction_policy="evict_first")
        tl.store(slot + word, values, mask=inside)
