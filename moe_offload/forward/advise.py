"""Advice while a model runs: a warning with a number and one thing to do about it, once per model.

    at_start    every layer has only the slots that one token needs
    say_what_is_remembered    where usage goes from now on, the first time that it goes there
    Advisor     decoding waits for experts much of the time, and that is for want of hits

TRANSFORMERS_NO_ADVISORY_WARNINGS=1 silences them, as it does transformers' own advice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cache.counters import Counters
from ..config.sizes import format_size, parse_size
from ..memory.machine import main_memory
from ..memory.stores import Store
from ..memory.stores.disk import DiskStore
from ..observe.profile import Profile
from ..plan.budget import Plan, budget_for, plan_slots
from ..plan.expected_hits import typical_hit_rate
from ..runtime.model import Runtime

logger = logging.getLogger("moe_offload")

EVERY = 32  # forwards between two looks at the counters
ENOUGH = 128  # tokens of decode before anything is said
WAITING = 0.3  # share of the time: if compute waits for longer, reading experts is what slows decoding down
HITTING = 0.6  # share of the requests: if more hit, further slots may bring little
WORTH = 0.05  # share of the experts: a larger budget is advised if it has at least so many more of them in slots


def advise_at_start(plan: Plan, budget: Any) -> None:
    """Say what an automatic `budget` has become, and warn of a plan without a slot to spare."""
    if budget in (None, "auto"):
        logger.info("budget: %s, taken from the memory available now", format_size(plan.budget_bytes, both=True))
    if plan.residency == 1 or any(s > layer.least for s, layer in zip(plan.slots, plan.layers, strict=True)):
        return
    share = min(1.0, 2 * plan.residency)
    budget_bytes = budget_for(share, plan.layers, plan.costs)
    _advise(
        "this budget (%s) is the least that works: slots for the experts in use at once, so nearly every token reads "
        "most of its experts anew. %s holds %.0f %% of the experts; `moe-offload estimate` shows what is between.",
        format_size(plan.budget_bytes), format_size(budget_bytes), 100 * share,
    )  # fmt: skip


def say_what_is_remembered(path: Path, began_with: Profile | None) -> None:
    """Say where usage is remembered: once aloud, before the file is there."""
    if began_with is None:
        _advise(
            "from now on the slots of this model begin with the experts that its last runs have used: how often each "
            "was used, and nothing else, is kept in %s (profile='off' ends that)",
            path,
        )
    else:
        logger.info("usage of %d tokens is remembered in %s", began_with.tokens, path)


class Advisor:
    """Told of every forward; adds up those of decode and looks at the sum now and then, until it has said something.

    The first forward after a prompt does not count as decode: it may compile a graph, and finds the slots as the prompt
    left them. Only layers that the host serves are looked at: a device that decides does not say how long it waited,
    and to ask for its counters would be to wait for it.
    """

    def __init__(self, runtime: Runtime, plan: Plan):
        self._layers = [layer for i, layer in enumerate(runtime.layers) if i not in runtime.device_layers]
        self._runtime, self._planned = runtime, plan
        self._sum, self._spent_s, self._forwards = Counters(), 0.0, 0
        self._begun: Counters | None = None  # the counters where the decoding at hand began
        self._said = not self._layers

    def begins(self, decode: bool) -> None:
        if not decode and self._begun is not None:
            self._sum, self._begun = self._sum + (self._totals() - self._begun), None

    def ended(self, decode: bool, spent_s: float) -> None:
        if self._said or not decode:
            return
        if self._begun is None:
            self._begun = self._totals()
            return
        self._spent_s += spent_s
        self._forwards += 1
        if self._forwards % EVERY == 0:
            self._look(self._sum + (self._totals() - self._begun))

    def _look(self, decode: Counters) -> None:
        if decode.tokens < ENOUGH or not decode.requests or not self._spent_s:
            return
        waiting, hitting = decode.stall_s / self._spent_s, decode.hit_rate
        if waiting > WAITING and hitting < HITTING:
            self._said = True
            stores = [layer.store for layer in self._layers]
            plan = replace(self._planned, slots=self._runtime.slots)
            _advise(
                "%.0f %% of the time of %d tokens was spent waiting for experts, of which %.0f %% were in slots when "
                "they were asked for. %s",
                100 * waiting, decode.tokens, 100 * hitting, suggest_remedy(plan, stores),
            )  # fmt: skip

    def _totals(self) -> Counters:
        return Counters.total(layer.counters for layer in self._layers)


def suggest_remedy(plan: Plan, stores: Sequence[Store]) -> str:
    """What to do about too many misses, in a sentence. A profile is not among them: it helps before the first token."""
    all_bytes = budget_for(1.0, plan.layers, plan.costs)
    room = plan.budget_bytes + parse_size("auto", total=max(main_memory().free, 2))
    larger = plan_slots(min(room, all_bytes), plan.layers, plan.costs)
    if larger.residency == 1:
        return f"A budget of {format_size(all_bytes)} holds all experts, and so much memory is available."
    if larger.residency >= plan.residency + WORTH:
        rate = typical_hit_rate(larger.slots, [layer.num_experts for layer in larger.layers])
        return (
            f"There is memory for a budget of {format_size(larger.budget_bytes)}, with {larger.residency:.0%} of the "
            f"experts in slots instead of {plan.residency:.0%} (about {rate.expected:.0%} hits, {rate.source}); all of "
            f"them take {format_size(all_bytes)}."
        )
    if any(isinstance(store, DiskStore) and not store.packed for store in stores):
        return (
            f"All experts take a budget of {format_size(all_bytes)}, more than there is. `moe-offload pack` writes a "
            "copy of the checkpoint from which an expert is read in one piece, without conversion."
        )
    return f"All experts take a budget of {format_size(all_bytes)}, more than there is; a faster disk would help."


def _advise(message: str, *arguments: object) -> None:
    from transformers.utils.logging import warning_advice

    warning_advice(logger, message, *arguments)
