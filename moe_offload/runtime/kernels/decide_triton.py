"""`decide` as one Triton kernel of one block: a layer's bookkeeping in one launch, without scratch memory.

Shapes: P token-expert pairs, E experts, S slots; the kernel's BLOCK_* are the powers of two at or above them.

Every block-wide step is a load, a comparison and a sum, and all that is read is read before anything is written. Three
barriers part what threads write from what others read: tables read | victims and loads written | loads entered into
the tables | slots looked up.

The scores have the bits of `cache/decay.py`: multiplications and additions must not be fused into one rounding, hence
`enable_fp_fusion=False`; division of doubles is correctly rounded on every device.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.decay import FULL
from .state import DeviceState, Loads

TILE = 4096  # comparisons held in registers at once: 32 a thread
FULL_UNIT = tl.constexpr(FULL)


def decide(ids_P: Tensor, state: DeviceState, loads: Loads, pace_2: Tensor) -> Tensor:
    """The slots of `ids_P`; changes `state` and fills `loads` as `reference.decide` does, to the bit."""
    experts, slots, pairs = len(state.slot_of_E), len(state.expert_at_S), len(ids_P)
    slots_P = torch.empty(pairs, dtype=torch.int64, device=ids_P.device)
    _decide[(1,)](
        ids_P,
        slots_P,
        state.slot_of_E,
        state.expert_at_S,
        state.used_E,
        state.unit_1,
        state.counts_E,
        state.totals_4,
        loads.expert_P,
        loads.slot_P,
        loads.count_1,
        pace_2,
        ids_P.stride(0),
        experts,
        slots,
        pairs,
        **blocks_of(experts, slots, pairs),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return slots_P


def blocks_of(experts: int, slots: int, pairs: int) -> dict[str, int]:
    """The sizes that a kernel is compiled for. Raises `ValueError` if the pairs cannot be resident together."""
    if pairs > slots or pairs == 0:
        raise ValueError(f"an event of {pairs} pairs; 1 to {slots}, the number of slots, can be resident together")
    block_E, block_S, block_P = (triton.next_power_of_2(n) for n in (experts, slots, pairs))
    columns = min(block_S, max(1, TILE // block_S))
    return {
        "BLOCK_E": block_E,
        "BLOCK_S": block_S,
        "BLOCK_P": block_P,
        "COLUMNS": columns,
        "PAIRS_E": min(block_P, max(1, TILE // block_E)),
        "PAIRS_S": min(block_P, max(1, TILE // block_S)),
        "PAIRS_COLUMNS": min(block_P, max(1, TILE // columns)),
    }


@triton.jit(do_not_specialize=["stride", "E", "S", "P"])
def _decide(
    ids_P,
    slots_P,
    slot_of_E,
    expert_at_S,
    used_E,
    unit_1,
    counts_E,
    totals_4,
    load_expert_P,
    load_slot_P,
    load_count_1,
    pace_2,
    stride,
    E,
    S,
    P,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS_E: tl.constexpr,
    PAIRS_S: tl.constexpr,
    PAIRS_COLUMNS: tl.constexpr,
):
    expert_E, slot_S, pair_P = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    is_E, is_S, is_P = expert_E < E, slot_S < S, pair_P < P
    id_P = tl.load(ids_P + pair_P * stride, mask=is_P, other=0)
    valid_P = (id_P >= 0) & (id_P < E)
    before_E = tl.load(slot_of_E + expert_E, mask=is_E, other=0)
    recorded_E = tl.load(counts_E + expert_E, mask=is_E, other=0)
    count_E = _uses(expert_E, is_E, ids_P, stride, E, P, BLOCK_P, PAIRS_E)
    needed_E = count_E > 0

    # The policy records the event before it chooses.
    unit = tl.load(unit_1) * tl.load(pace_2)
    weight = unit * tl.load(pace_2 + 1)
    score_E = _score(tl.load(used_E + expert_E, mask=is_E, other=0.0), count_E, unit, weight)

    # The missing experts, ascending, take slots in turn.
    missing_E = needed_E & (before_E < 0)
    rank_E = tl.cumsum(missing_E.to(tl.int32), 0) - 1
    misses = tl.sum(missing_E.to(tl.int32), 0)

    # Which slots give way, the first one first: as many stand before a slot as have a smaller key, or the same further
    # left. The keys of the other slots are computed again, a few columns at a time: a block has them in no other order.
    resident_S = tl.load(expert_at_S + slot_S, mask=is_S, other=-1)
    order_S = tl.full([BLOCK_S], BLOCK_S, tl.int32)
    if misses > 0:  # nearly always 0, while decoding
        key_S = _key(slot_S, expert_at_S, used_E, unit, weight, ids_P, stride, E, S, P, BLOCK_P, PAIRS_S)
        order_S = tl.zeros([BLOCK_S], tl.int32)
        for first in range(0, BLOCK_S, COLUMNS):
            slot_C = first + tl.arange(0, COLUMNS)
            key_C = _key(slot_C, expert_at_S, used_E, unit, weight, ids_P, stride, E, S, P, BLOCK_P, PAIRS_COLUMNS)
            same = (key_C[None, :] == key_S[:, None]) & (slot_C[None, :] < slot_S[:, None])
            order_S += tl.sum(((key_C[None, :] < key_S[:, None]) | same).to(tl.int32), 1)
    hits = tl.sum(needed_E.to(tl.int32), 0) - misses
    refused = tl.sum((is_P & ~valid_P).to(tl.int32), 0)
    which_4 = tl.arange(0, 4)
    totals = tl.load(totals_4 + which_4)
    totals += tl.where(which_4 == 0, 1, tl.where(which_4 == 1, hits, tl.where(which_4 == 2, misses, refused)))
    tl.debug_barrier()  # all has been read

    full = unit > FULL_UNIT
    tl.store(unit_1, tl.where(full, 1.0, unit))
    tl.store(used_E + expert_E, score_E, mask=is_E)
    tl.store(counts_E + expert_E, recorded_E + count_E, mask=is_E)
    tl.store(totals_4 + which_4, totals)
    tl.store(load_count_1, misses)
    # A victim is not needed, and what is missing has no slot: the two never name the same expert.
    victim_S = is_S & (order_S < misses)
    tl.store(slot_of_E + resident_S, -1, mask=victim_S & (resident_S >= 0))
    tl.store(load_expert_P + rank_E, expert_E, mask=missing_E)
    tl.store(load_slot_P + order_S, slot_S, mask=victim_S)
    tl.store(load_expert_P + pair_P, -1, mask=is_P & (pair_P >= misses))
    tl.store(load_slot_P + pair_P, -1, mask=is_P & (pair_P >= misses))
    tl.debug_barrier()  # the loads are complete

    loaded_P = pair_P < misses
    new_expert_P = tl.load(load_expert_P + pair_P, mask=loaded_P, other=0)
    new_slot_P = tl.load(load_slot_P + pair_P, mask=loaded_P, other=0)
    tl.store(slot_of_E + new_expert_P, new_slot_P, mask=loaded_P)
    tl.store(expert_at_S + new_slot_P, new_expert_P, mask=loaded_P)
    tl.debug_barrier()  # and so are the tables

    found_P = tl.load(slot_of_E + id_P, mask=is_P & valid_P, other=0)
    tl.store(slots_P + pair_P, found_P.to(tl.int64), mask=is_P)


@triton.jit
def _uses(expert_N, is_N, ids_P, stride, E, P, BLOCK_P: tl.constexpr, PAIRS: tl.constexpr):
    """How many pairs name each of these experts, 0 where there is none."""
    count_N = tl.zeros(expert_N.shape, tl.int32)
    for first in range(0, BLOCK_P, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        id = tl.load(ids_P + pair * stride, mask=pair < P, other=-1)
        count_N += tl.sum((expert_N[:, None] == id[None, :]).to(tl.int32), 1)
    return tl.where(is_N, count_N, 0)


@triton.jit
def _score(used_N, count_N, unit, weight):
    """The decayed uses once this event has been recorded."""
    used_N = used_N + weight * count_N.to(tl.float64)
    return tl.where(unit > FULL_UNIT, used_N / unit, used_N)


@triton.jit
def _key(slot_N, expert_at_S, used_E, unit, weight, ids_P, stride, E, S, P, BLOCK_P: tl.constexpr, PAIRS: tl.constexpr):
    """What slots give way by, the smallest first: free ones, the least used, and never one that the event needs."""
    expert_N = tl.load(expert_at_S + slot_N, mask=slot_N < S, other=-1)
    is_N = expert_N >= 0
    count_N = _uses(expert_N, is_N, ids_P, stride, E, P, BLOCK_P, PAIRS)
    score_N = _score(tl.load(used_E + expert_N, mask=is_N, other=0.0), count_N, unit, weight)
    key_N = tl.where(is_N, score_N, -1.0)
    return tl.where((count_N > 0) | (slot_N >= S), float("inf"), key_N)
