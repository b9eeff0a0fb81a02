"""Which expert of a layer is in which slot. No torch: the simulator replays traces through this very class.

Shapes: E experts, S slots.

One `lookup` is one *event*: the distinct experts that one layer needs at once. It is atomic: when its loads have been
committed, all of them are resident together, and no victim was one of them, nor of an event still loading. A prompt may
be larger than the slots: it is not resident together, and leaves in the slots what the policy thinks will be wanted.

    lookup(used)  hits keep their slot; each miss takes a free slot, or a victim's, and becomes a pending `Load`
    fill(used)    a prompt: loads for those worth a slot, and the experts whose rows pass through scratch
    demand(e)     one expert, where a model's own code asks for one after the other
    guess(ids)    the same for what will probably be asked for, as far as there is room; it is no access
    commit(load)  its bytes have arrived: only now is it resident, and a miss counted
    abort(load)   they did not: the slot is free again, nothing points to it

A slot whose victim has been chosen is unmapped at once, so a failed load can never leave a mapping to half a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..errors import RoutingError
from . import Policy
from .counters import LayerCounters


@dataclass(frozen=True)
class Load:
    """A row on its way: `expert` into `slot`."""

    expert: int
    slot: int


class LayerCache:
    """The slot table of one layer: `slots` slots for `num_experts` experts."""

    def __init__(self, num_experts: int, slots: int, policy: Policy, name: str = "experts"):
        self.name, self.num_experts, self.policy = name, num_experts, policy
        self.counters = LayerCounters(counts=[0] * num_experts)
        self.resize(slots)

    def resize(self, slots: int) -> None:
        """Have `slots` slots, all empty. The policy and the counters keep what they know."""
        self.slots = slots
        self.slot_of = [-1] * self.num_experts
        self.expert_at = [-1] * slots
        self.pending: dict[int, Load] = {}
        self.free = list(range(slots - 1, -1, -1))

    def check(self, experts: Collection[int]) -> None:
        """Raise `RoutingError` unless every id is in [0, E): a negative id would silently wrap to another expert."""
        if experts and (min(experts) < 0 or max(experts) >= self.num_experts):
            bad = sorted(e for e in experts if not 0 <= e < self.num_experts)
            raise RoutingError(
                f"{self.name}: the router asked for expert {bad[0]}, but the layer has experts "
                f"0..{self.num_experts - 1}; the model's routing code or its configuration is damaged"
            )

    def fits(self, pairs: int) -> bool:
        """Whether an event of so many token-expert `pairs` may be resident together: it evicts as a decode step does.

        Pairs are counted, not distinct experts: a graph knows their number before it knows the ids.
        """
        return pairs <= self.slots

    def lookup(self, used: Mapping[int, int], tokens: int = 1) -> list[Load]:
        """Make room for one event, at most S distinct experts; return the loads that are missing.

        `used`: how many of the event's `tokens` use each expert.
        """
        if len(used) > self.slots:
            raise ValueError(f"{self.name}: an event of {len(used)} experts does not fit {self.slots} slots")
        absent = [e for e in used if self.slot_of[e] < 0]
        if not absent:  # nearly always, while decoding: nothing to choose
            self._access(used, tokens)
            self.counters.hits += len(used)
            return []
        # Sorted: gather and grouped code list the same ids in different orders, and a replay must load the same rows.
        missing = sorted(e for e in absent if e not in self.pending)
        candidates = self._evictable(used)
        if len(missing) > len(self.free) + len(candidates):
            raise ValueError(
                f"{self.name}: {len(missing)} loads, but {len(self.free)} free slots and {len(candidates)} that may be "
                "taken; loads of an earlier event are still pending"
            )
        self._access(used, tokens)
        self.counters.hits += len(used) - len(absent)
        return self._admit(missing, candidates)

    def fill(self, used: Mapping[int, int], tokens: int = 1) -> tuple[list[Load], list[int]]:
        """An event too large for the slots (prefill): loads of what is worth a slot, and the rest, without one.

        The rows that are read anyway and those that are resident but not asked for compete for the slots, and the
        policy, which has heard how often the prompt used each, decides: a prompt does not flush what decoding needs,
        and does replace what it shows to be out of use. Both lists begin with what is used most.
        """
        self._access(used, tokens)
        absent = sorted((e for e in used if self.slot_of[e] < 0), key=lambda e: (-used[e], e))
        missing = [e for e in absent if e not in self.pending]
        self.counters.hits += len(used) - len(absent)
        candidates = self._evictable(used)
        surplus = len(missing) - len(self.free)
        # A policy keeps the last of equal candidates: resident experts before missing ones, and then those used most.
        losers = set(self.policy.victims([*reversed(missing), *candidates], surplus)) if surplus > 0 else set()
        without_slot = [e for e in missing if e in losers]
        giving_way = [e for e in candidates if e in losers]
        return self._admit([e for e in missing if e not in losers], giving_way), without_slot

    def fill_free_slots(self, experts: Sequence[int]) -> list[Load]:
        """Loads that fill the free slots with `experts`, the most wanted first, before anything has asked for them."""
        missing = [e for e in dict.fromkeys(experts) if self.slot_of[e] < 0 and e not in self.pending]
        return self._admit(missing[: len(self.free)], [])

    def demand(self, expert: int, keep: Collection[int]) -> Load | None:
        """The load of one missing expert, asked for alone; none of `keep` gives way. None where no slot can be had.

        What is asked for one by one is told by whoever asks: it counts no event.
        """
        candidates = [] if self.free else self._evictable(keep)
        if not self.free and not candidates:
            return None
        return self._admit([expert], candidates)[0]

    def guess(self, experts: Sequence[int], most: int, keep: Collection[int] = ()) -> list[Load]:
        """Loads of at most `most` experts that will probably be asked for next, likeliest first; `keep` stays, too.

        Each takes a free slot or that of the coldest row that is not itself expected. It is no access: the policy
        hears of what is asked for, not of what was expected.
        """
        missing = [e for e in dict.fromkeys(experts) if self.slot_of[e] < 0 and e not in self.pending]
        if most <= 0 or not missing:
            return []
        candidates = self._evictable([*experts, *keep])
        return self._admit(missing[: min(most, len(self.free) + len(candidates))], candidates)

    def commit(self, load: Load, nbytes: int, demanded: bool = True) -> None:
        """The row has arrived whole: `nbytes` were read for it."""
        del self.pending[load.expert]
        self.slot_of[load.expert] = load.slot
        self.expert_at[load.slot] = load.expert
        if demanded:
            self.count_miss(nbytes)
        else:
            self.counters.prewarm_bytes += nbytes

    def abort(self, load: Load) -> None:
        """The row did not arrive: give the slot back."""
        if self.pending.pop(load.expert, None) is not None:
            self.free.append(load.slot)

    def abort_all(self) -> None:
        """Forget all pending loads, and make every slot without an expert free.

        Ctrl-C may have come after a slot was taken and before its load was pending: that slot is free again, too.
        """
        self.pending.clear()
        self.free = [slot for slot in range(self.slots - 1, -1, -1) if self.expert_at[slot] < 0]

    def count_miss(self, nbytes: int) -> None:
        self.counters.misses += 1
        self.counters.bytes_read += nbytes

    def resident(self) -> list[int]:
        return [e for e in self.expert_at if e >= 0]

    def _evictable(self, needed: Collection[int]) -> list[int]:
        """Residents that are not `needed`, in the order of their slots."""
        protected = {*needed, *self.pending}
        return [e for e in self.expert_at if e >= 0 and e not in protected]

    def _access(self, used: Mapping[int, int], tokens: int) -> None:
        self.policy.access(used, tokens)
        self.counters.count_event(used, tokens)

    def _admit(self, experts: list[int], candidates: list[int]) -> list[Load]:
        """A slot for each of `experts`: the free ones, then those of victims among the candidates."""
        n = len(experts) - len(self.free)
        victims = self.policy.victims(candidates, n) if n > 0 else []
        slots = [self.free.pop() for _ in range(len(experts) - len(victims))]
        for victim in victims:
            slot = self.slot_of[victim]
            self.slot_of[victim] = self.expert_at[slot] = -1
            slots.append(slot)
        loads = [Load(e, slot) for e, slot in zip(experts, slots, strict=True)]
        self.pending.update((load.expert, load) for load in loads)
        return loads
