"""Rows that are guessed, copied to the device before anything asks for them, on a stream beside the one that computes.

    choose(ids, slots, state, staging)    which of the guessed experts are missing, best first, as many as fit
    stage(rows, scratch, staging)         beside: copy their rows into scratch, chunk by chunk, until told to stop
    gather_staged(rows, scratch, ...)     what `gather` does, but a chunk that lies in scratch is taken from there

A guess takes no slot: which slots an event gets, its hits, misses and scores are the same with guesses and without. It
only changes where a missing row comes from, and both places hold the same bytes.

`STAGERS` has one set for each kind of device; all give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..state import DeviceState, Loads
from .state import Staging

__all__ = ["STAGERS", "Stagers", "Staging"]


class Stagers(NamedTuple):
    """Shapes: P token-expert pairs, Q those of the layer before, E experts, S slots, G staged rows, N elements of one
    row.

    choose(ids_P, slots_Q, state, staging) -> slots_Q
                                           fills `expert_G` and `count_1` with the first G different ones of `ids_P`
                                           that exist and have no slot, in their order; none where `on_1` is 0. Lowers
                                           `stop_1`. Changes nothing of the state, and copies `slots_Q`.
    stage(rows_EN, scratch_GN, staging)    copies their rows into scratch, in the order of their chunks, until `stop_1`
                                           is raised, and says in `reached_R` how far it has come. Runs beside what
                                           reads neither.
    gather_staged(rows_EN, scratch_GN, bank_SN, loads, state, staging)
                                           copies the rows of `loads` into their slots, as `gather`; what `reached_R`
                                           says is in scratch comes from there. Counts in `state.guesses_4`.
    """

    choose: Callable[[Tensor, Tensor, DeviceState, Staging], Tensor]
    stage: Callable[[Tensor, Tensor, Staging], None]
    gather_staged: Callable[[Tensor, Tensor, Tensor, Loads, DeviceState, Staging], None]


def _cpu() -> Stagers:
    from .reference import choose, gather_staged, stage

    return Stagers(choose, stage, gather_staged)


def _cuda() -> Stagers:
    from .choose_triton import choose
    from .copies_triton import gather_staged, stage

    return Stagers(choose, stage, gather_staged)


#: Kind of device -> its kernels, imported when they are first asked for.
STAGERS: dict[str, Callable[[], Stagers]] = {"cpu": _cpu, "cuda": _cuda}
