"""What fetch, wait, stream and experts do at run time: one `LayerRuntime` per MoE layer, one `Runtime` per model.

Shapes: T tokens, K experts per token, P = T*K pairs, E experts, S slots, H hidden, N elements of one row.

    decode    fetch(ids)  -> the cache names slots and starts to load what is missing
              wait()      -> all there, here are the slots
    stream    the same lookup, but the pairs of resident experts are computed while the missing ones load, and each of
              those as it arrives; in prefill what has no slot passes through a few scratch rows

This file is the only one that turns a cache's `Load` into bytes in a slot. It knows no graph and imports no pass.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .buffers import POISON, Rows
from .cache import LayerCache, Load
from .errors import ClosedError
from .experts import ExpertBank
from .policies import Policy
from .scratch import Held, Scratch
from .stores import Store
from .transfer import Ticket, Transfer


class RunCore(Protocol):
    """The experts code of one site: a result per pair, or, given `rows` (ascending positions or a slice), for those.

    There are as many `slots` as results.
    """

    def __call__(
        self,
        x_P: Tensor,
        slots: Tensor,
        bank_SN: Tensor,
        others: Sequence[Tensor],
        rows: Tensor | slice | None = None,
    ) -> Tensor: ...


EXPECTED_USES = 2  # pairs per expert from which on reading ahead for the next layer is no guess
PREWARM_DEPTH = 4  # rows on their way at once before anything has been asked for


@dataclass(frozen=True)
class Arrival:
    """A row on its way: into the slot of `load`, or to be used from scratch row `place` (-1: none).

    With both it was read ahead into scratch, and goes on to the slot from there.
    """

    expert: int
    load: Load | None
    place: int
    ticket: Ticket


class LayerRuntime:
    """One layer: its bank of slots, its cache, and the store its rows rest in."""

    def __init__(
        self,
        bank: ExpertBank,
        *,
        slots: int,
        policy: Policy,
        store: Store,
        transfer: Transfer,
        scratch: Scratch,
        lock: threading.RLock | None = None,
        poison: bool = False,
    ):
        self.bank, self.store, self.transfer, self.poison = bank, store, transfer, poison
        self.lock = lock or threading.RLock()  # that of the model: its layers share the scratch rows
        self.cache = LayerCache(bank.num_experts, slots, policy, bank.name)
        layout = bank.layout
        self.slots = Rows(slots, layout.row_bytes, layout.dtype, poison)
        self.shared, self.scratch = scratch, scratch.rows(layout)
        self.following: LayerRuntime | None = None  # for which rows are read ahead; set by `Runtime`
        self.module_core: RunCore | None = None  # set where the model is patched; serves `experts`
        self._arriving: deque[Arrival] = deque()
        self._held: dict[int, Held] = {}  # read ahead for the event in hand

    # The verbs of a graph.

    def fetch(self, ids_P: Tensor) -> Tensor:
        ids, used = self._event(ids_P)
        cache = self.cache
        loads = cache.lookup(list(used), self._tokens(len(ids)))
        slot_of = cache.slot_of
        if not loads:
            slots = [slot_of[e] for e in ids]
        else:
            self._start(loads)
            pending = cache.pending
            slots = [pending[e].slot if e in pending else slot_of[e] for e in ids]
        return torch.tensor(slots, dtype=ids_P.dtype).view(ids_P.shape)

    def wait(self, ticket_P: Tensor) -> Tensor:
        while self._arriving:
            self._arrived()
        return ticket_P.clone()

    def stream(self, x_P: Tensor, ids_P: Tensor, core: RunCore, others: Sequence[Tensor] = ()) -> Tensor:
        ids, used = self._event(ids_P)
        cache, tokens = self.cache, self._tokens(len(ids))
        past: list[int] = []
        if len(ids) <= cache.slots:  # as small as a decode step: it may evict like one
            loads = cache.lookup(list(used), tokens)
        else:  # most used first: those get the free slots
            loads, past = cache.fill([e for e, _ in used.most_common()], tokens)
        if not loads and not past:
            slot_of = cache.slot_of
            slots_P = torch.tensor([slot_of[e] for e in ids], dtype=ids_P.dtype)
            return core(x_P, slots_P, self.slots.bank_SN, others)
        try:
            self._start(loads)
            return self._overlapped(x_P, ids_P.reshape(-1), core, others, deque(past))
        except BaseException:
            self._abort()
            raise

    def experts(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The whole module, for callers that no pass has rewritten: slower, never wrong."""
        tokens, k = ids_TK.shape
        with self.lock, torch.autocast(x_TH.device.type, enabled=False):
            if self.module_core is None:
                raise closed(self.bank.name)
            out_PH = self.stream(x_TH.repeat_interleave(k, dim=0), ids_TK.reshape(-1), self.module_core)
            weighted_PH = out_PH * weights_TK.reshape(-1, 1)
            return weighted_PH.view(tokens, k, -1).sum(dim=1).to(x_TH.dtype)

    def _event(self, ids_P: Tensor) -> tuple[list[int], Counter[int]]:
        """The ids of one event, checked and counted."""
        if self._arriving or self._held:
            self._abort()  # an event that was interrupted before its wait left loads behind; a new one starts clean
        ids = ids_P.reshape(-1).tolist()
        used = Counter(ids)
        self.cache.check(list(used))
        counts = self.cache.counters.counts
        for e, count in used.items():
            counts[e] += count
        begun = time.perf_counter()
        self._held = self.shared.claim(self.bank.index, used)
        self.cache.counters.stall_s += time.perf_counter() - begun
        return ids, used

    # Loading.

    def prewarm(self, experts: Iterable[int], progress: Callable[[int], object] = lambda n: None) -> None:
        """Fill free slots with `experts`, most wanted first. Stops cleanly at any exception (Ctrl-C)."""
        if self._arriving:
            self._abort()
        try:
            for load in self.cache.prewarm(list(experts)):
                self._start([load], urgent=False)
                if len(self._arriving) >= PREWARM_DEPTH:
                    self._arrived(demanded=False)
                    progress(1)
            while self._arriving:
                self._arrived(demanded=False)
                progress(1)
        except BaseException:
            self._abort()
            raise

    def _start(self, loads: Iterable[Load], urgent: bool = True) -> None:
        try:
            for load in loads:
                self._send(load.expert, load, urgent=urgent)
        except BaseException:
            self._abort()
            raise

    def _send(self, expert: int, load: Load | None, place: int = -1, urgent: bool = True) -> None:
        held = self._held.pop(expert, None)
        if held is not None:
            self.cache.counters.ahead += 1
            self.cache.counters.late += not held.ticket.done.is_set()
            self._arriving.append(Arrival(expert, load, held.place, held.ticket))
            return
        rows, i = (self.slots, load.slot) if load is not None else (self.scratch, place)
        if self.poison:
            rows.bytes[i].fill_(POISON)
        ticket = self.transfer.start(self.store, self.bank.index, expert, rows.rows[i], urgent)
        self._arriving.append(Arrival(expert, load, place if load is None else -1, ticket))

    def _arrived(self, demanded: bool = True) -> Arrival:
        """The next row, in the order they were asked for, once it is complete and, if it has a slot, resident."""
        begun = time.perf_counter()
        try:
            arrival = self._arriving[0]
            nbytes = self.transfer.wait(arrival.ticket)
            self._arriving.popleft()
            if arrival.load is not None:
                if arrival.place >= 0:
                    self.slots.bytes[arrival.load.slot].copy_(self.scratch.bytes[arrival.place])
                self.cache.commit(arrival.load, nbytes, demanded)
            else:
                self.cache.count_miss(nbytes)
                self.cache.counters.streamed += 1
            return arrival
        except BaseException:
            self._abort()
            raise
        finally:
            self.cache.counters.stall_s += time.perf_counter() - begun

    def _abort(self) -> None:
        """Give back the slot of every load that has not been committed, once nothing writes there any more."""
        tickets = [one.ticket for one in self._arriving] + [held.ticket for held in self._held.values()]
        self._arriving, self._held = deque(), {}
        try:
            self.transfer.cancel(tickets)
        finally:
            for load in list(self.cache.pending.values()):
                self.cache.abort(load)
                if self.poison:
                    self.slots.bytes[load.slot].fill_(POISON)

    # Computing while loading.

    def _overlapped(
        self, x_P: Tensor, ids_P: Tensor, core: RunCore, others: Sequence[Tensor], past: deque[int]
    ) -> Tensor:
        """What is here first, then the pairs of each row as it arrives.

        `past` are experts without a slot: as many of their rows as there is scratch are on their way at any time.
        Scratch that has done its part serves the next layer.
        """
        places = self._free_places()
        for e in [e for e in past if e in self._held]:  # these first: they are here, or will be soon
            past.remove(e)
            self._send(e, None)
        while places and past:
            self._send(past.popleft(), None, places.popleft())
        expected = self._expected_next(ids_P)
        for place in places:
            self._read_ahead(expected, place)
        absent = [arrival.expert for arrival in self._arriving] + list(past)
        # Grouped experts code has sorted its pairs: those of one expert are neighbours, and need no gathering.
        order_P = None if bool((ids_P[1:] >= ids_P[:-1]).all()) else ids_P.argsort(stable=True)
        ends_E = ids_P.bincount(minlength=self.cache.num_experts).cumsum(0).tolist()
        out_P: Tensor | None = None

        def compute(rows: Tensor | slice, slots: Tensor, source: Rows) -> Tensor:
            part = core(x_P, slots, source.bank_SN, others, rows)
            out = part.new_empty((len(ids_P), *part.shape[1:])) if out_P is None else out_P
            if isinstance(rows, slice):
                out[rows] = part
                return out
            return out.index_copy_(0, rows, part)

        def compute_arrived() -> Tensor:
            arrival = self._arrived()
            e = arrival.expert
            rows = slice(ends_E[e - 1] if e else 0, ends_E[e])
            source, i = (self.scratch, arrival.place) if arrival.load is None else (self.slots, arrival.load.slot)
            slots = torch.full((rows.stop - rows.start,), i)
            out = compute(rows if order_P is None else order_P[rows], slots, source)
            if arrival.place >= 0:
                if past:
                    self._send(past.popleft(), None, arrival.place)
                else:
                    self._read_ahead(expected, arrival.place)
            return out

        here_E = torch.ones(self.cache.num_experts, dtype=torch.bool)
        here_E[absent] = False
        rows = here_E[ids_P].nonzero().flatten()
        # Rows read ahead first: until they are out of scratch, nothing more can be read into it.
        while self._arriving and self._arriving[0].place >= 0 and self._arriving[0].ticket.done.is_set():
            out_P = compute_arrived()
        if len(rows):
            out_P = compute(rows, torch.tensor(self.cache.slot_of)[ids_P[rows]], self.slots)
        while self._arriving:
            out_P = compute_arrived()
        if out_P is None:
            raise AssertionError(f"{self.bank.name}: nothing was computed")  # there was a load, so there were pairs
        return out_P

    def _free_places(self) -> deque[int]:
        """Scratch rows that hold nothing read ahead for this event."""
        held = {one.place for one in self._held.values()} | {one.place for one in self._arriving}
        return deque(i for i in range(len(self.scratch.rows)) if i not in held)

    def _expected_next(self, ids_P: Tensor) -> Iterator[int]:
        """Experts that the following layer will probably need and has to read, the likeliest first.

        Only where an event uses most experts of a layer, as a long prompt does: then what is absent there will mostly
        be asked for. Guesses for a single token need its router (`prefetch`).
        """
        following = self.following
        if following is None or len(ids_P) < EXPECTED_USES * following.cache.num_experts:
            return iter(())
        cache = following.cache
        counts = cache.counters.counts
        return iter(sorted((e for e, s in enumerate(cache.slot_of) if s < 0), key=counts.__getitem__, reverse=True))

    def _read_ahead(self, expected: Iterator[int], place: int) -> None:
        following, expert = self.following, next(expected, None)
        if following is not None and expert is not None:
            self.shared.read_ahead(
                following.bank.index, following.store, following.bank.layout, expert, place, following.count_wasted
            )

    def count_wasted(self, nbytes: int) -> None:
        self.cache.counters.wasted_bytes += nbytes

    def _tokens(self, pairs: int) -> int:
        return -(-pairs // self.bank.top_k)


def closed(name: str) -> ClosedError:
    return ClosedError(
        f"{name}: its expert cache was closed (close(), or leaving its `with` block); load the model again to use it"
    )


class Runtime:
    """All layers of one model, the lock that serialises its forwards, and what `close` gives back."""

    def __init__(
        self,
        layers: Sequence[LayerRuntime],
        stores: Sequence[Store],
        transfer: Transfer,
        lock: threading.RLock | None = None,
    ):
        self.layers = list(layers)
        for layer, following in pairwise(self.layers):
            if layer.bank.layout.row_bytes == following.bank.layout.row_bytes:  # they share scratch rows one to one
                layer.following = following
        self.lock = lock or threading.RLock()
        self.closed = False
        self._stores, self._transfer = stores, transfer

    def check_open(self) -> None:
        if self.closed:
            raise closed("this model")

    def read_stacked(self, index: int) -> dict[str, Tensor]:
        """The real stacked parameters `{field: [E, ...]}` of one layer, read anew from its store."""
        self.check_open()
        layer = self.layers[index]
        layout, num_experts = layer.bank.layout, layer.bank.num_experts
        stacked = {f.name: torch.empty((num_experts, *f.shape), dtype=f.dtype) for f in layout.fields}
        row = torch.empty(layout.row_bytes, dtype=torch.uint8)
        for e in range(num_experts):
            layer.store.read(index, e, memoryview(row.numpy()))
            for f in layout.fields:
                stacked[f.name][e] = row[f.offset : f.offset + f.nbytes].view(f.dtype).view(f.shape)
        return stacked

    def close(self) -> None:
        """Give back files, threads and memory. Idempotent; waits for a forward in flight."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self._transfer.close()
            for store in self._stores:
                store.close()
            for layer in self.layers:
                layer.module_core = None
                layer.slots = layer.scratch = Rows(0, layer.bank.layout.row_bytes, layer.bank.layout.dtype)
                layer.shared.release()
