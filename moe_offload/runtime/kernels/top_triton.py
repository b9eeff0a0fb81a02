"""`decide_top` as one Triton kernel of one block: the router's best experts, and which slots they get.

Shapes: T tokens, E experts, K of them a token, P = T*K pairs, S slots; BLOCK_E is the power of two at or above E.

torch.topk does not promise which of equal scores it takes, nor their order, and a routed sum rounds by that order. What
CUDA's does for up to 32 of a row that one block reads is plain from its source (TensorTopK.cu and SortUtils.cuh, as
read in 2026), and the same here:

    chosen      all that are greater than the K-th greatest, then of those equal to it the first ones
    in order    by a bitonic network of 32 places, into which they come in that order; it moves equals about

NaN is the greatest. Without equals among the chosen any way to sort gives the same, so the network is run only if there
are some. `chooses_as_torch` compares both on the device at hand, and where they differ torch.topk is left in place.

Longer than 250 lines: each of a kernel's many arguments takes one, twice.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decide_triton import _decide, blocks_of
from .reference import TOP
from .state import DeviceState, Loads

LOWEST = tl.constexpr(-(2**63))
LAST = tl.constexpr(2**31 - 1)
PLACES = tl.constexpr(TOP)


def decide_top(
    scores_TE: Tensor, k: int, state: DeviceState, loads: Loads, pace_2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` greatest scores of each token, whose they are, and their slots [P]; what torch.topk and then `decide`
    would give, to the bit."""
    tokens, experts = scores_TE.shape
    slots, pairs = len(state.expert_at_S), tokens * k
    values_TK, ids_TK = _empty(scores_TE, k)
    slots_P = torch.empty(pairs, dtype=torch.int64, device=scores_TE.device)
    blocks = blocks_of(experts, slots, pairs)
    _decide_top[(1,)](
        scores_TE,
        values_TK,
        ids_TK,
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
        *scores_TE.stride(),
        tokens,
        k,
        experts,
        slots,
        **blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return values_TK, ids_TK, slots_P


@functools.cache
def chooses_as_torch(experts: int, k: int, device: torch.device) -> bool:
    """Whether torch.topk of this device chooses and orders as the kernel does, where many scores are equal, too."""
    if k > TOP:
        return False
    draw = torch.Generator().manual_seed(0)
    for most in (3, experts, 1 << 20):
        scores_TE = torch.randint(-most, most, (64, experts), generator=draw).float()
        scores_TE[:8].masked_fill_(scores_TE[:8] == 1, torch.nan)
        scores_TE[8:16].masked_fill_(scores_TE[8:16] == 1, -0.0)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given_TE = scores_TE.to(device, dtype)
            pairs = zip(top_k(given_TE, k), torch.topk(given_TE, k, dim=-1), strict=True)
            if not all(torch.equal(_bits(ours), _bits(theirs)) for ours, theirs in pairs):
                return False
    return True


def top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`decide_top` without its slots: torch.topk."""
    values_TK, ids_TK = _empty(scores_TE, k)
    experts = scores_TE.shape[1]
    _top_of_each[(len(scores_TE),)](
        scores_TE, values_TK, ids_TK, *scores_TE.stride(), k, experts, BLOCK_E=triton.next_power_of_2(experts)
    )
    return values_TK, ids_TK


def _empty(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens, experts = scores_TE.shape
    if not 1 <= k <= min(experts, TOP):
        raise ValueError(f"the {k} greatest of {experts} scores; 1 to {min(experts, TOP)} are chosen here")
    values_TK = torch.empty(tokens, k, dtype=scores_TE.dtype, device=scores_TE.device)
    return values_TK, torch.empty(tokens, k, dtype=torch.int64, device=scores_TE.device)


def _bits(x: Tensor) -> Tensor:
    """Numbers that are equal where two tensors are the same to the bit, NaN included."""
    return x if x.dtype == torch.int64 else x.view({2: torch.int16, 4: torch.int32}[x.itemsize])


@triton.jit(do_not_specialize=["stride_t", "stride_e", "T", "K", "E", "S"])
def _decide_top(
    scores_TE,
    values_P,
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
    stride_t,
    stride_e,
    T,
    K,
    E,
    S,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS_E: tl.constexpr,
    PAIRS_S: tl.constexpr,
    PAIRS_COLUMNS: tl.constexpr,
):
    for t in range(T):
        _top(scores_TE + t * stride_t, stride_e, values_P + t * K, ids_P + t * K, K, E, BLOCK_E)
    tl.debug_barrier()  # the ids are complete
    _decide(
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
        1,
        E,
        S,
        T * K,
        BLOCK_E,
        BLOCK_S,
        BLOCK_P,
        COLUMNS,
        PAIRS_E,
        PAIRS_S,
        PAIRS_COLUMNS,
    )


@triton.jit(do_not_specialize=["stride_t", "stride_e", "K", "E"])
def _top_of_each(scores_TE, values_TK, ids_TK, stride_t, stride_e, K, E, BLOCK_E: tl.constexpr):
    t = tl.program_id(0)
    _top(scores_TE + t * stride_t, stride_e, values_TK + t * K, ids_TK + t * K, K, E, BLOCK_E)


@triton.jit
def _top(scores_E, stride, values_K, ids_K, K, E, BLOCK_E: tl.constexpr):
    """The K greatest of a row of scores, and which they are."""
    e = tl.arange(0, BLOCK_E)
    score_E = tl.load(scores_E + e * stride, mask=e < E, other=0.0).to(tl.float32)
    order_E = _order(score_E)
    # All are different: where scores are equal, the first one is the greatest.
    key_E = tl.where(e < E, order_E.to(tl.int64) * 4294967296 + (LAST - e), LOWEST)
    left_E, key, equals, before = key_E, tl.max(key_E, 0), 0, float("inf")
    for i in range(K):
        key = tl.max(left_E, 0)
        left_E = tl.where(left_E == key, LOWEST, left_E)
        chosen = LAST - (key & 4294967295)
        tl.store(ids_K + i, chosen)
        score = tl.load(scores_E + chosen * stride).to(tl.float32)
        equals += ((i > 0) & (_goes_before(before, score) == 0)).to(tl.int32)
        before = score

    place_L = tl.arange(0, PLACES)
    is_L = place_L < K
    tl.debug_barrier()  # the ids have been written
    if equals > 0:
        # In the order in which the network is given them: first all that are greater than the last one.
        greater_E = (key_E >= key) & (order_E > _order(before))
        equal_E = (key_E >= key) & (order_E == _order(before))
        greater = tl.sum(greater_E.to(tl.int32), 0)
        rank_E = tl.where(greater_E, tl.cumsum(greater_E.to(tl.int32), 0), greater + tl.cumsum(equal_E.to(tl.int32), 0))
        tl.store(ids_K + rank_E - 1, e.to(tl.int64), mask=greater_E | equal_E)
        tl.debug_barrier()  # and so have they in that order
        id_L = tl.load(ids_K + place_L, mask=is_L, other=0).to(tl.int32)
        score_L = tl.load(scores_E + id_L * stride, mask=is_L, other=0.0).to(tl.float32)
        id_L = _sort(id_L, score_L, is_L.to(tl.int32), place_L)
        tl.debug_barrier()  # all has been read
        tl.store(ids_K + place_L, id_L.to(tl.int64), mask=is_L)
        tl.debug_barrier()

    id_L = tl.load(ids_K + place_L, mask=is_L, other=0)
    tl.store(values_K + place_L, tl.load(scores_E + id_L * stride, mask=is_L), mask=is_L)


@triton.jit
def _order(score):
    """Whole numbers in the order of the scores, NaN above all."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 2147483647, bits)
    return tl.where(score == score, bits, 2147483647)


@triton.jit
def _goes_before(a, b):
    """1 where `a` is greater than `b`, else 0. NaN is greater than any number."""
    return ((a > b) | ((a != a) & (b == b))).to(tl.int32)


@triton.jit
def _sort(id_L, score_L, valid_L, place_L):
    """The ids in the order that a bitonic network gives their scores, those that are valid first."""
    for level in tl.static_range(1, 6):
        for step in tl.static_range(0, level):
            id_L, score_L, valid_L = _exchange(id_L, score_L, valid_L, place_L, 1 << (level - 1 - step), 1 << level)
    return id_L


@triton.jit
def _exchange(id_L, score_L, valid_L, place_L, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """One step of the network: places whose numbers differ by the stride change what they hold, or keep it."""
    is_first_L = (place_L & STRIDE) == 0
    other_L = place_L ^ STRIDE
    other_score_L, other_valid_L = tl.gather(score_L, other_L, 0), tl.gather(valid_L, other_L, 0)
    first_L, second_L = tl.where(is_first_L, score_L, other_score_L), tl.where(is_first_L, other_score_L, score_L)
    first_valid_L = tl.where(is_first_L, valid_L, other_valid_L)
    second_valid_L = tl.where(is_first_L, other_valid_L, valid_L)
    in_order_L = ((_goes_before(first_L, second_L) == 1) & (first_valid_L == 1)) | (second_valid_L == 0)
    # Every other run of `SIZE` places is sorted the other way round; the last level is one run of all.
    is_turned_L = (place_L & SIZE) != 0
    change_L = in_order_L == is_turned_L
    return (
        tl.where(change_L, tl.gather(id_L, other_L, 0), id_L),
        tl.where(change_L, other_score_L, score_L),
        tl.where(change_L, other_valid_L, valid_L),
    )
