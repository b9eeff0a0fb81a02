"""Reading ahead where the device decides: the rows of a guess are copied into scratch while this layer computes.

    compute   place 1 ┐ products 1, attention 2, router 2 ── place 2: stop, join, gather from scratch or host
    side              └─ stage the guess for layer 2 ─────────┘

All of it is launched, nothing waits for the host, and a CUDA graph can hold it. While the device decides nobody else
uses the scratch rows. The link belongs to what was asked for: a guess is begun after this layer's own rows have been
copied, and stops as soon as the next layer has decided.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import OffloadError
from ...memory.transfer.fork import Fork
from ..in_flight import Arrivals
from ..kernels import Loads
from ..kernels.staging import Stagers, Staging
from ..kernels.state import DeviceState
from .guard import Guard

MOST_ROWS = 64  # staged at a time


class DeviceGuesses:
    """The guess that is under way, of which there is at most one in a model, and whether guessing pays."""

    def __init__(self, layers: Sequence[Arrivals], stagers: Stagers, fork: Fork):
        device = layers[0].slots.bank_SN.device
        rows = max(len(one.scratch_rows.rows) for one in layers)
        self.staging = Staging.empty(max(1, min(MOST_ROWS, rows)), device)
        self.guard = Guard()
        self._stagers, self._fork = stagers, fork
        self._forked = False  # whether anything may run beside
        self._open: Arrivals | None = None  # the layer that it is for, once all of it has been launched
        with torch.inference_mode(False):  # what is made within that mode cannot be written outside of it
            self._seen_L4 = torch.zeros(
                len(layers), 4, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu"
            )
        self._seen_of = self._seen_L4.numpy()  # the same memory: to look at it takes microseconds

    def begin(self, arrivals: Arrivals, ids_P: Tensor, slots_Q: Tensor, rows_EN: Tensor, state: DeviceState) -> Tensor:
        """Copy what is missing of `ids_P` into scratch, beside what is launched from now on. Returns `slots_Q`, copied
        by what is launched for it."""
        self.settle()
        staging = self._of(arrivals)
        same_Q = self._stagers.choose(ids_P.reshape(-1), slots_Q.reshape(-1), state, staging)
        self._forked = True
        with self._fork.begin():
            self._stagers.stage(rows_EN, arrivals.scratch_rows.bank_SN, staging)
        self._open = arrivals
        return same_Q.view(slots_Q.shape)

    def gather(self, arrivals: Arrivals, rows_EN: Tensor, loads: Loads, state: DeviceState) -> bool:
        """Copy the rows of `loads` into their slots, with what was guessed. False, and nothing is done, where nothing
        was for this layer."""
        if self._open is not arrivals or not self._stop():
            return False
        scratch_GN, bank_SN = arrivals.scratch_rows.bank_SN, arrivals.slots.bank_SN
        self._stagers.gather_staged(rows_EN, scratch_GN, bank_SN, loads, state, self._of(arrivals))
        return True

    def settle(self) -> None:
        """What is launched from now on finds nothing under way: a step was interrupted, or hands change."""
        if self._forked and not self._stop() and self._fork.capturing():
            raise OffloadError(
                "a CUDA graph is being captured, and the step before was interrupted while it read ahead, which no "
                "graph can wait for. Run one more decode step, then capture"
            )

    def resume(self, guesses_L4: Tensor) -> None:
        """The device decides again, after something else; `guesses_L4`, of the host, is what it has counted."""
        self._seen_L4.copy_(guesses_L4)
        self.guard.skip(*self._seen())

    def look(self, guesses_L4: Tensor) -> None:
        """A step has been launched: switch guessing on or off, by what was seen of the steps before. Nothing waits."""
        if self._fork.capturing():  # it would be part of the graph, and what is seen was seen at a replay
            return
        before = self.guard.on
        self.guard.step(time.perf_counter(), *self._seen())
        if self.guard.on != before:
            self.staging.on_1.fill_(int(self.guard.on))
        self._seen_L4.copy_(guesses_L4, non_blocking=True)

    def _seen(self) -> tuple[int, int]:
        guessed, used, *_ = self._seen_of.sum(0).tolist()
        return guessed, used

    def _stop(self) -> bool:
        """Whether what was begun is there for what is launched from now on."""
        self._forked, self._open = False, None
        self.staging.stop_1.fill_(1)
        return self._fork.join()

    def _of(self, arrivals: Arrivals) -> Staging:
        return self.staging.first(len(arrivals.scratch_rows.rows))
