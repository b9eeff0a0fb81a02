"""The kernels of staging as tensor operations: a CPU runs them, and tests compare every other version with them.

Shapes: P token-expert pairs, Q those of the layer before, E experts, S slots, G staged rows, N elements of one row, R
programs, C chunks of a row.

Nothing here waits for the device, and nothing runs beside anything: what is staged is there when `stage` returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import put_rows, scatter
from ..state import DeviceState, Loads
from .state import CHUNK, PROGRAMS, Staging, words_of


def choose(ids_P: Tensor, slots_Q: Tensor, state: DeviceState, staging: Staging) -> Tensor:
    """Which of the guessed experts are to be staged: those that exist and have no slot, in the order of the guess."""
    num_experts, rows, pairs = len(state.slot_of_E), len(staging.expert_G), len(ids_P)
    valid_P = (ids_P >= 0) & (ids_P < num_experts)
    ids_P = torch.where(valid_P, ids_P, num_experts).long()  # E: a sink behind the experts
    pair_P = torch.arange(pairs, device=ids_P.device)
    first_E = pair_P.new_full((num_experts + 1,), pairs).scatter_reduce(0, ids_P, pair_P, "amin")
    missing_P = valid_P & (state.slot_of_E[ids_P.clamp(max=num_experts - 1)] < 0)
    taken_P = missing_P & (first_E[ids_P] == pair_P) & (staging.on_1 != 0)
    rank_P = taken_P.cumsum(0) - 1
    staging.expert_G.fill_(-1)
    scatter(staging.expert_G, torch.where(taken_P, rank_P, rows).clamp(max=rows), ids_P)
    staging.count_1.copy_(taken_P.sum().clamp(max=rows))
    staging.stop_1.zero_()
    return slots_Q.clone()


def stage(rows_EN: Tensor, scratch_GN: Tensor, staging: Staging) -> None:
    """Copy the rows of the staged experts into scratch, all of them, unless it has been stopped already."""
    rows = len(staging.expert_G)
    begins_1 = staging.stop_1 == 0
    here_G = (staging.expert_G >= 0) & begins_1
    staged_GN = torch.where(here_G.unsqueeze(1), rows_EN[staging.expert_G.long().clamp(min=0)], scratch_GN[:rows])
    scratch_GN[:rows].copy_(staged_GN)
    chunks_1 = torch.where(begins_1, staging.count_1, 0) * _chunks(rows_EN)
    program_R = torch.arange(PROGRAMS, dtype=torch.int32, device=chunks_1.device)
    staging.reached_R.copy_(torch.div(chunks_1 - program_R + PROGRAMS - 1, PROGRAMS, rounding_mode="floor"))


def gather_staged(
    rows_EN: Tensor, scratch_GN: Tensor, bank_SN: Tensor, loads: Loads, state: DeviceState, staging: Staging
) -> None:
    """Copy the rows of `loads` into their slots, from scratch as far as they are there, and count what was of use."""
    chunks = _chunks(rows_EN)
    there_GC = _there(staging, chunks)
    match_PG = (loads.expert_P.unsqueeze(1) == staging.expert_G) & (loads.expert_P >= 0).unsqueeze(1)
    row_P = match_PG.int().argmax(1)  # 0 where there is none
    there_PC = there_GC[row_P] & match_PG.any(1, keepdim=True)
    host_PW = words_of(rows_EN)[loads.expert_P.long().clamp(min=0)]
    there_PW = there_PC.repeat_interleave(CHUNK, dim=1)[:, : host_PW.shape[1]]
    from_PW = torch.where(there_PW, words_of(scratch_GN)[row_P], host_PW)
    put_rows(from_PW.view(rows_EN.dtype), bank_SN, loads)

    here_G, used_G = staging.expert_G >= 0, match_PG.any(0)
    done_G = there_GC.sum(1)
    bytes_G = (done_G * CHUNK).clamp(max=host_PW.shape[1]) * 8
    counted = (here_G, used_G, used_G & (done_G < chunks), torch.where(used_G, 0, bytes_G))
    state.guesses_4.add_(torch.stack([one.sum() for one in counted]))


def _chunks(rows_EN: Tensor) -> int:
    return -(-words_of(rows_EN).shape[1] // CHUNK)


def _there(staging: Staging, chunks: int) -> Tensor:
    """Which chunks of which staged row have been copied, [G, C]."""
    rows = len(staging.expert_G)
    chunk_GC = torch.arange(rows * chunks, device=staging.reached_R.device).view(rows, chunks)
    return staging.reached_R[chunk_GC % PROGRAMS] > torch.div(chunk_GC, PROGRAMS, rounding_mode="floor")
