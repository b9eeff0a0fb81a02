"""One layer's cache while the device decides, and the change of hands between it and the host.

Shapes: P = T*K token-expert pairs, E experts, S slots, N elements of one row.

    decode    the device     `place`: a few kernels, nothing the host waits for, so that a CUDA graph can hold it
    the rest  the host       `LayerCache`: prompts, profiles, calls that no pass has rewritten, layers on disk

Both are the same cache with the same policy. Only one of them is in charge, and the other is out of date: `take_over`
and `hand_back` carry the tables of all layers over, in one copy at each change. A layer whose rows the device cannot
read has no cache here, and the host's is always right: it may serve such a layer while the device decides for the
others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..cache.counters import LayerCounters
from ..errors import RoutingError
from .ahead.on_device import DeviceGuesses
from .in_flight import Arrivals
from .kernels import Kernels, Loads, make_pace
from .kernels.state import REFUSED
from .kernels.state_block import StateBlock


class DeviceCaches:
    """The device caches of a model, one for each of `layers`, which need not be all; `rows` are theirs, in order.

    They change hands together: reading ahead, the host looks at other layers too. `guesses` are there where the device
    is to read ahead, too.
    """

    def __init__(
        self,
        layers: Sequence[Arrivals],
        rows: Sequence[Tensor | None],
        half_life: float,
        kernels: Kernels,
        guesses: DeviceGuesses | None = None,
    ):
        device = layers[0].slots.bank_SN.device
        self.in_charge, self.guesses = False, guesses
        self._prepared: set[int] = set()
        self._block = StateBlock([(one.cache.num_experts, one.cache.slots) for one in layers], device)
        self._refused_L = self._block.totals_L4[:, REFUSED]
        with torch.inference_mode(False):  # what is made within that mode cannot be written outside of it
            self._seen_L = torch.zeros(len(layers), dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu")
        self._seen = self._seen_L.numpy()  # the same memory: to look at it takes a microsecond
        parts = zip(layers, rows, range(len(layers)), strict=True)
        self.caches = [
            DeviceCache(arrivals, rows_EN, self._block, i, half_life, kernels, guesses)
            for arrivals, rows_EN, i in parts
        ]

    def take_over(self, sizes: Collection[int]) -> None:
        """The device decides from now on; its events have so many pairs."""
        first = self.caches[0].arrivals
        if not self._prepared.issuperset(sizes):
            first.transfer.refuse_capture(first.moe.name)
            for cache in self.caches:
                cache.prepare(sizes)
            self._prepared.update(sizes)
        self._settle_guesses()
        if not self.in_charge:
            first.transfer.refuse_capture(first.moe.name)
            first.scratch.drop()  # read ahead for what the device may load itself
            for cache in self.caches:
                cache.push()
            self._block.send()
            if self.guesses is not None:
                self.guesses.resume(torch.stack([mirror.guesses_4 for mirror in self._block.mirrors]))
            self.in_charge = True

    def hand_back(self) -> None:
        """The host decides from now on, and its counters are up to date.

        Raises `RoutingError` if a router asked for an expert that does not exist since `take_over`.
        """
        if self.in_charge:
            first = self.caches[0].arrivals
            first.transfer.refuse_capture(first.moe.name)
            self._settle_guesses()  # it reads into scratch, which the host is about to use
            self._block.fetch()
            refused = [(cache.pull(), cache.arrivals) for cache in self.caches]
            self._seen_L.zero_()  # what was on its way there has arrived: `fetch` has waited
            self.in_charge = False  # not before: interrupted, it is done again
            for count, arrivals in refused:
                if count:
                    raise no_such_expert(arrivals.moe.name, count, arrivals.cache.num_experts)

    def _settle_guesses(self) -> None:
        if self.guesses is not None:
            self.guesses.settle()

    def end_step(self) -> None:
        """A forward has been launched. Raises `RoutingError` if the device met an id that is no expert's. A GPU is not
        waited for: it may be seen a forward later."""
        if self.guesses is not None and self.in_charge:
            self.guesses.look(self._block.guesses_L4)
        self._seen_L.copy_(self._refused_L, non_blocking=True)
        if self._seen.any():
            self.hand_back()


class DeviceCache:
    """One layer's cache on the device.

    `rows_EN` are all rows of the layer, in memory that the device can read; None if it cannot. Where every expert has a
    slot, the host loads all of them before the device takes over, and nothing is ever missing. Its state is layer `i`
    of the `block`; `mirror` is that on the host, which `push` writes to and `pull` reads.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        rows_EN: Tensor | None,
        block: StateBlock,
        i: int,
        half_life: float,
        kernels: Kernels,
        guesses: DeviceGuesses | None = None,
    ):
        self.guesses = guesses  # of the model
        self.device = arrivals.slots.bank_SN.device
        self.arrivals, self.rows_EN, self.half_life, self.kernels = arrivals, rows_EN, half_life, kernels
        self._block, self._i = block, i
        self.state, self.mirror = block.states[i], block.mirrors[i]
        # One of each per size of event, made once: a graph that was captured goes on using them.
        self._paces: dict[int, Tensor] = {}
        self._loads: dict[int, Loads] = {}

    def prepare(self, sizes: Collection[int]) -> None:
        """Allocate what events of so many pairs need, before a CUDA graph is recorded: what is allocated while
        recording lies in the graph's memory pool, which may hold nothing but the graph's own tensors."""
        with torch.inference_mode(False):  # what is made within that mode cannot be written outside of it
            for pairs in set(sizes) - self._loads.keys():
                tokens = self.arrivals.moe.tokens_of(pairs)
                self._paces[pairs] = make_pace(tokens, self.half_life, self.device)
                self._loads[pairs] = Loads.empty(pairs, self.device)

    def place(self, ids_P: Tensor) -> Tensor:
        """The slots of `ids_P`, all of which hold their rows once what has been launched here is done."""
        with self._deciding(ids_P.numel()) as (loads, pace_2):
            slots_P = self.kernels.decide(ids_P.reshape(-1), self.state, loads, pace_2)
        return slots_P.view(ids_P.shape)

    def place_top(self, scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `k` best experts of each token: their scores, their ids and, as `place` gives them, their slots [P]."""
        with self._deciding(scores_TE.shape[0] * k) as (loads, pace_2):
            return self.kernels.decide_top(scores_TE, k, self.state, loads, pace_2)

    def place_ahead(self, ids_P: Tensor, slots_Q: Tensor) -> Tensor:
        """These will probably be asked for next: what of them has no slot is copied beside what is launched now.

        Returns a copy of `slots_Q`, so that what needs these slots is launched after.
        """
        if self.guesses is None or self.rows_EN is None or self.whole:
            return slots_Q.clone()
        return self.guesses.begin(self.arrivals, ids_P, slots_Q, self.rows_EN, self.state)

    def chooses_as_torch(self) -> bool:
        """Whether `place_top` gives what torch.topk would, on this device."""
        moe = self.arrivals.moe
        return self.kernels.chooses_as_torch(moe.num_experts, moe.top_k, self.device)

    @contextlib.contextmanager
    def _deciding(self, pairs: int) -> Iterator[tuple[Loads, Tensor]]:
        """Around the decision on an event of so many pairs, which fills the loads: they are copied at its end."""
        if pairs not in self._loads:
            raise AssertionError(f"{self.arrivals.moe.name}: an event of {pairs} pairs was not prepared for")
        loads = self._loads[pairs]
        try:
            yield loads, self._paces[pairs]
            if self.rows_EN is not None and not self.whole:
                self._gather(self.rows_EN, loads)
        except BaseException:  # Ctrl-C, too: the tables may name rows that have not been copied
            if not self.whole:
                self.state.forget()
            raise

    def _gather(self, rows_EN: Tensor, loads: Loads) -> None:
        if self.guesses is None or not self.guesses.gather(self.arrivals, rows_EN, loads, self.state):
            self.kernels.gather(rows_EN, self.arrivals.slots.bank_SN, loads)

    def push(self) -> None:
        """Write what the host decided to the mirror; an error of the store leaves the host in charge."""
        self.arrivals.abort_interrupted()
        if self.whole:
            self._load_all()
        self.mirror.push(self.arrivals.cache)

    def _load_all(self) -> None:
        """Load what has no slot yet."""
        arrivals, cache = self.arrivals, self.arrivals.cache
        for e in range(cache.num_experts):
            arrivals.start_prewarm(e)
        arrivals.take_all(demanded=False)
        if -1 in cache.slot_of:
            raise AssertionError(f"{arrivals.moe.name}: {cache.slots} slots do not hold {cache.num_experts} experts")

    @property
    def whole(self) -> bool:
        """Whether every expert has a slot."""
        return self.arrivals.cache.slots == self.arrivals.cache.num_experts

    @property
    def readable(self) -> bool:
        """Whether the device can go on by itself: it reads the rows, or has them all."""
        return self.rows_EN is not None or self.whole

    def resize(self) -> None:
        """Follow the host's cache, which has another number of slots now. Call it while the host decides."""
        self.state, self.mirror = self._block.resize(self._i, self.arrivals.cache.slots)

    def counters(self) -> LayerCounters:
        moe = self.arrivals.moe
        return self.state.counters(self.arrivals.cache.counters, moe.top_k, moe.layout.row_bytes)

    def pull(self) -> int:
        """Let the host's cache be what the mirror says; return how many ids were out of range."""
        self.mirror.pull(self.arrivals.cache, self.arrivals.moe.top_k, self.arrivals.moe.layout.row_bytes)
        return int(self.mirror.totals_4[REFUSED])


def no_such_expert(name: str, refused: int, num_experts: int) -> RoutingError:
    return RoutingError(
        f"{name}: the router asked {refused} times for an expert outside 0..{num_experts - 1}; what was computed since "
        "is void. The model's routing code or its configuration is damaged"
    )
