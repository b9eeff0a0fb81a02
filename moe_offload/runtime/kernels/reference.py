"""The kernels as tensor operations: a CPU runs them, and tests compare every other version with them.

Shapes: P token-expert pairs, E experts, S slots, N elements of one row, H hidden, M or O outputs of a matrix.

Nothing here waits for the device: no `.item()`, no `nonzero`, no shape that depends on a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache.decay import FULL
from .state import DeviceState, Loads

TOP = 32  # experts of a token, at most, that `decide_top` chooses


def decide(ids_P: Tensor, state: DeviceState, loads: Loads, pace_2: Tensor) -> Tensor:
    """The slots of `ids_P`; changes `state` to what holds once the `loads`, which it fills, have been done.

    As `LayerCache.lookup` does: the distinct experts that are missing, ascending, take the free slots, ascending, and
    then those of the residents with the smallest use that the event does not need. P must not exceed S.
    """
    num_experts, slots, pairs = len(state.slot_of_E), len(state.expert_at_S), len(ids_P)
    valid_P = (ids_P >= 0) & (ids_P < num_experts)
    ids_P = torch.where(valid_P, ids_P, num_experts).long()  # E: a sink behind the experts
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_P.device)
    count_E = count_E.index_add(0, ids_P, torch.ones_like(ids_P))[:num_experts]
    needed_E = count_E > 0

    # The policy records the event before it chooses.
    unit_1 = state.unit_1 * pace_2[0]
    weight_1 = unit_1 * pace_2[1]
    used_E = state.used_E + weight_1 * count_E
    full_1 = unit_1 > FULL
    state.used_E.copy_(torch.where(full_1, used_E / unit_1, used_E))
    state.unit_1.copy_(torch.where(full_1, 1.0, unit_1))
    state.counts_E.add_(count_E)

    # Which slots give way, the first one first: free ones, then the least used.
    expert_S = state.expert_at_S.long()
    needed_S = (expert_S >= 0) & needed_E[expert_S.clamp(min=0)]
    key_S = torch.where(expert_S >= 0, state.used_E[expert_S.clamp(min=0)], -1.0)
    order_S = torch.where(needed_S, torch.inf, key_S).argsort(stable=True)

    # The missing experts, ascending, take them in turn.
    missing_E = needed_E & (state.slot_of_E < 0)
    rank_E = missing_E.cumsum(0) - 1
    slot_E = order_S[rank_E.clamp(0, slots - 1)]
    victim_S = torch.zeros(slots + 1, dtype=torch.bool, device=ids_P.device)
    victim_S = victim_S.index_fill(0, torch.where(missing_E, slot_E, slots), True)[:slots]
    evicted_E = (state.slot_of_E >= 0) & victim_S[state.slot_of_E.clamp(min=0).long()]
    slot_of_E = torch.where(missing_E, slot_E.int(), torch.where(evicted_E, -1, state.slot_of_E))
    state.slot_of_E.copy_(slot_of_E)
    experts_E = torch.arange(num_experts, dtype=torch.int32, device=ids_P.device)
    scatter(state.expert_at_S, torch.where(missing_E, slot_E, slots), experts_E)

    misses = missing_E.sum()
    loads.expert_P.fill_(-1)
    loads.slot_P.fill_(-1)
    scatter(loads.expert_P, torch.where(missing_E, rank_E, pairs), experts_E)
    scatter(loads.slot_P, torch.where(missing_E, rank_E, pairs), slot_E.int())
    loads.count_1.copy_(misses)
    state.totals_4.add_(torch.stack([torch.ones_like(misses), needed_E.sum() - misses, misses, (~valid_P).sum()]))
    return torch.where(valid_P, slot_of_E[ids_P.clamp(max=num_experts - 1)], 0).long()


def decide_top(
    scores_TE: Tensor, k: int, state: DeviceState, loads: Loads, pace_2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` greatest scores of each token, whose they are, and their slots [P]."""
    values_TK, ids_TK = torch.topk(scores_TE, k, dim=-1)
    return values_TK, ids_TK, decide(ids_TK.reshape(-1), state, loads, pace_2)


def gather(rows_EN: Tensor, bank_SN: Tensor, loads: Loads) -> None:
    """Copy the rows of `loads` from host memory into their slots."""
    put_rows(rows_EN[loads.expert_P.long().clamp(min=0)], bank_SN, loads)


def put_rows(rows_PN: Tensor, bank_SN: Tensor, loads: Loads) -> None:
    """Write each row to the slot that `loads` has for it.

    Entries after the count write back what some slot holds already: a number of rows that depends on a value would have
    to be waited for.
    """
    here_P = loads.slot_P >= 0
    slot_P = loads.slot_P.long().clamp(min=0)
    rows_PN = torch.where(here_P.unsqueeze(1), rows_PN, bank_SN[0])
    # Padding goes first, and to slot 0: where slot 0 is loaded itself, that comes later and stands.
    for i in reversed(range(len(slot_P))):
        bank_SN.index_copy_(0, slot_P[i : i + 1], rows_PN[i : i + 1])


def indexed_mm(x_PH: Tensor, weight_SMH: Tensor, slots_P: Tensor) -> Tensor:
    """`out[p] = weight[slots[p]] @ x[p]`, [P, M]."""
    return torch.bmm(weight_SMH[slots_P], x_PH.unsqueeze(-1)).squeeze(-1)


def gated_mm(x_PH: Tensor, weight_SMH: Tensor, slots_P: Tensor) -> Tensor:
    """`silu(gate) * up` of `[gate, up] = weight[slots[p]] @ x[p]`, [P, I]."""
    gate_PI, up_PI = indexed_mm(x_PH, weight_SMH, slots_P).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_PI) * up_PI


def grouped_mm(x_PH: Tensor, weight_SHO: Tensor, slots_P: Tensor) -> Tensor:
    """`out[p] = x[p] @ weight[slots[p]]`, [P, O]. A matrix is copied for every pair: to compare with, not to use."""
    return indexed_mm(x_PH, weight_SHO.transpose(1, 2), slots_P)


def scatter(target: Tensor, index: Tensor, source: Tensor) -> None:
    """`target[index] = source`, where an index behind the end is written nowhere."""
    padded = torch.cat([target, target[:1]])
    target.copy_(padded.index_copy(0, index.long(), source.to(target.dtype))[:-1])
