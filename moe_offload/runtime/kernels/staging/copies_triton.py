"""`stage` and `gather_staged` as Triton kernels: the device reads pinned host memory, or what it has of it already.

Shapes: P token-expert pairs, E experts, S slots, G staged rows, N elements of one row, R programs.

Both have the grid of `gather`, and deal out chunks in turn as it does. Whether to go on, `stage` asks before each
chunk. All threads of a program must hear the same: hence an atomic operation, which one thread does for all. (A load is
done by each thread, and one that came later could see another value: half a chunk, counted as a whole one.)
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..gather_triton import WARPS
from ..state import DeviceState, Loads
from .state import CHUNK, PROGRAMS, Staging, words_of


def stage(rows_EN: Tensor, scratch_GN: Tensor, staging: Staging) -> None:
    """Copy the rows of the staged experts into scratch until `stop_1` is raised; `reached_R` says how far it came."""
    words_EN, words_GN = words_of(rows_EN), words_of(scratch_GN)
    _stage[(PROGRAMS,)](
        words_EN,
        words_GN,
        staging.expert_G,
        staging.count_1,
        staging.stop_1,
        staging.reached_R,
        words_EN.shape[1],
        words_EN.stride(0),
        words_GN.stride(0),
        PROGRAMS=PROGRAMS,
        CHUNK=CHUNK,
        num_warps=WARPS,
    )


def gather_staged(
    rows_EN: Tensor, scratch_GN: Tensor, bank_SN: Tensor, loads: Loads, state: DeviceState, staging: Staging
) -> None:
    """Copy the rows of `loads` into their slots, from scratch as far as they are there, and count what was of use."""
    words_EN, words_GN, words_SN = words_of(rows_EN), words_of(scratch_GN), words_of(bank_SN)
    if not words_EN.shape[1] == words_GN.shape[1] == words_SN.shape[1]:
        raise ValueError(
            f"rows of {8 * words_EN.shape[1]} bytes do not fit slots of {8 * words_SN.shape[1]} bytes and scratch rows "
            f"of {8 * words_GN.shape[1]} bytes"
        )
    _gather_staged[(PROGRAMS,)](
        words_EN,
        words_GN,
        words_SN,
        loads.expert_P,
        loads.slot_P,
        loads.count_1,
        staging.expert_G,
        staging.reached_R,
        state.guesses_4,
        words_EN.shape[1],
        len(staging.expert_G),
        words_EN.stride(0),
        words_GN.stride(0),
        words_SN.stride(0),
        BLOCK_G=triton.next_power_of_2(len(staging.expert_G)),
        PROGRAMS=PROGRAMS,
        CHUNK=CHUNK,
        num_warps=WARPS,
    )


@triton.jit
def _stage(
    rows_EN,
    scratch_GN,
    expert_G,
    count_1,
    stop_1,
    reached_R,
    words,
    row_stride,
    scratch_stride,
    PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(words, CHUNK)  # of one row
    program = tl.program_id(0)
    end = tl.load(count_1) * chunks
    i, reached = program, 0
    while (i < end) & (tl.atomic_add(stop_1, 0, sem="relaxed") == 0):
        g = i // chunks
        row = rows_EN + tl.maximum(tl.load(expert_G + g), 0).to(tl.int64) * row_stride  # -1 would be no address
        staged = scratch_GN + g.to(tl.int64) * scratch_stride
        word = (i - g * chunks) * CHUNK + tl.arange(0, CHUNK)
        inside = word < words
        values = tl.load(row + word, mask=inside, eviction_policy="evict_first")
        tl.store(staged + word, values, mask=inside)
        i += PROGRAMS
        reached += 1
    tl.store(reached_R + program, reached)


@triton.jit(do_not_specialize=["G"])
def _gather_staged(
    rows_EN,
    scratch_GN,
    bank_SN,
    expert_P,
    slot_P,
    count_1,
    expert_G,
    reached_R,
    guesses_4,
    words,
    G,
    row_stride,
    scratch_stride,
    slot_stride,
    BLOCK_G: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(words, CHUNK)  # of one row
    count = tl.load(count_1)
    row_G = tl.arange(0, BLOCK_G)
    staged_G = tl.load(expert_G + row_G, mask=row_G < G, other=-1)
    for i in range(tl.program_id(0), count * chunks, PROGRAMS):
        p = i // chunks
        expert = tl.load(expert_P + p)
        g = tl.max(tl.where(staged_G == expert, row_G, -1), 0)
        j = tl.maximum(g, 0) * chunks + (i - p * chunks)  # the number of this chunk among the staged ones
        is_there = (g >= 0) & (tl.load(reached_R + j % PROGRAMS) > j // PROGRAMS)
        row = rows_EN + expert.to(tl.int64) * row_stride
        staged = scratch_GN + tl.maximum(g, 0).to(tl.int64) * scratch_stride
        slot = bank_SN + tl.load(slot_P + p).to(tl.int64) * slot_stride
        word = (i - p * chunks) * CHUNK + tl.arange(0, CHUNK)
        inside = word < words
        # Only one of them reads anything.
        from_host = tl.load(row + word, mask=inside & (is_there == 0), other=0, eviction_policy="evict_first")
        from_scratch = tl.load(staged + word, mask=inside & is_there, other=0, eviction_policy="evict_first")
        tl.store(slot + word, tl.where(is_there, from_scratch, from_host), mask=inside)
    if tl.program_id(0) == PROGRAMS - 1:  # it has the fewest chunks
        _count(expert_P, count, staged_G, row_G, reached_R, guesses_4, chunks, words, PROGRAMS, CHUNK)


@triton.jit
def _count(
    expert_P,
    count,
    staged_G,
    row_G,
    reached_R,
    guesses_4,
    chunks,
    words,
    PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add to `guesses_4`: rows guessed, those of them that were asked for, those of these that were not complete, and
    the bytes of the others."""
    used_G = tl.zeros(staged_G.shape, tl.int32)
    for p in range(count):
        used_G += (staged_G == tl.load(expert_P + p)).to(tl.int32)
    # Program r has copied its first `reached` chunks: r, r + R, r + 2 R ... Those of row g are in between.
    program_R = tl.arange(0, PROGRAMS)
    reached_1R = tl.load(reached_R + program_R)[None, :]
    first_GR = ((row_G * chunks)[:, None] - program_R[None, :] + PROGRAMS - 1) // PROGRAMS
    end_GR = ((row_G * chunks + chunks)[:, None] - program_R[None, :] + PROGRAMS - 1) // PROGRAMS
    done_G = tl.sum(tl.minimum(end_GR, reached_1R) - tl.minimum(first_GR, reached_1R), 1)
    bytes_G = tl.minimum(done_G * CHUNK, words).to(tl.int64) * 8
    guessed = tl.sum((staged_G >= 0).to(tl.int64), 0)
    used = tl.sum(used_G.to(tl.int64), 0)
    late = tl.sum(tl.where((used_G > 0) & (done_G < chunks), 1, 0).to(tl.int64), 0)
    wasted = tl.sum(tl.where(used_G > 0, 0, bytes_G), 0)
    which_4 = tl.arange(0, 4)
    counted = tl.where(which_4 == 0, guessed, tl.where(which_4 == 1, used, tl.where(which_4 == 2, late, wasted)))
    tl.store(guesses_4 + which_4, tl.load(guesses_4 + which_4) + counted)
