"""`choose` as one Triton kernel of one block: a few loads and a sum, before the layer's products are launched.

Shapes: P token-expert pairs, Q those of the layer before, E experts, G staged rows; the kernel's BLOCK_* are the
powers of two at or above them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decide_triton import TILE
from ..state import DeviceState
from .state import Staging


def choose(ids_P: Tensor, slots_Q: Tensor, state: DeviceState, staging: Staging) -> Tensor:
    """Which of the guessed experts are to be staged; to the bit as `reference.choose`. Returns a copy of `slots_Q`."""
    same_Q = torch.empty_like(slots_Q)
    block_P = triton.next_power_of_2(len(ids_P))
    _choose[(1,)](
        ids_P,
        slots_Q,
        same_Q,
        state.slot_of_E,
        staging.expert_G,
        staging.count_1,
        staging.stop_1,
        staging.on_1,
        ids_P.stride(0),
        len(state.slot_of_E),
        len(staging.expert_G),
        len(ids_P),
        len(slots_Q),
        BLOCK_G=triton.next_power_of_2(len(staging.expert_G)),
        BLOCK_P=block_P,
        BLOCK_Q=triton.next_power_of_2(len(slots_Q)),
        PAIRS=min(block_P, max(1, TILE // block_P)),
        num_warps=4,
    )
    return same_Q


@triton.jit(do_not_specialize=["stride", "E", "G", "P", "Q"])
def _choose(
    ids_P,
    slots_Q,
    same_Q,
    slot_of_E,
    expert_G,
    count_1,
    stop_1,
    on_1,
    stride,
    E,
    G,
    P,
    Q,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pair_Q = tl.arange(0, BLOCK_Q)
    tl.store(same_Q + pair_Q, tl.load(slots_Q + pair_Q, mask=pair_Q < Q), mask=pair_Q < Q)
    row_G, pair_P = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    id_P = tl.load(ids_P + pair_P * stride, mask=pair_P < P, other=-1)
    valid_P = (id_P >= 0) & (id_P < E)
    slot_P = tl.load(slot_of_E + id_P, mask=valid_P, other=0)
    before_P = tl.zeros([BLOCK_P], tl.int32)  # how often an expert was named already
    for first in range(0, BLOCK_P, PAIRS):
        pair_C = first + tl.arange(0, PAIRS)
        id_C = tl.load(ids_P + pair_C * stride, mask=pair_C < P, other=-1)
        same = (id_C[None, :] == id_P[:, None]) & (pair_C[None, :] < pair_P[:, None])
        before_P += tl.sum(same.to(tl.int32), 1)
    taken_P = valid_P & (slot_P < 0) & (before_P == 0) & (tl.load(on_1) != 0)
    rank_P = tl.cumsum(taken_P.to(tl.int32), 0) - 1
    count = tl.minimum(tl.sum(taken_P.to(tl.int32), 0), G)
    tl.store(expert_G + rank_P, id_P.to(tl.int32), mask=taken_P & (rank_P < G))
    tl.store(expert_G + row_G, -1, mask=(row_G >= count) & (row_G < G))
    tl.store(count_1, count)
    tl.store(stop_1, 0)
