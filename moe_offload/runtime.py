"""What fetch, wait, stream and experts do at run time: one `LayerRuntime` per MoE layer, one `Runtime` per model.

Shapes: T tokens, K experts per token, P = T*K pairs, E experts, S slots, H hidden, N elements of one row.

    decode    fetch(ids)  -> the cache names slots and loads what is missing; wait() -> all there, here are the slots
    prefill   stream(...) -> resident experts in one wave, then the missing ones, a few scratch rows at a time

This file is the only one that turns a cache's `Load` into bytes in a slot. It knows no graph and imports no pass.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .cache import LayerCache, Load
from .errors import ClosedError
from .experts import ExpertBank
from .policies import Policy
from .stores import Store
from .transfer import Ticket, Transfer


class RunCore(Protocol):
    """The experts code of one site: a result per pair, or, given `rows`, per pair of `rows` (ascending positions)."""

    def __call__(
        self, x_P: Tensor, slots_P: Tensor, bank_SN: Tensor, others: Sequence[Tensor], rows: Tensor | None = None
    ) -> Tensor: ...


POISON = 0xFF  # every byte of a free slot in tests: NaN in each floating type we hold


class Rows:
    """A buffer of rows: seen by kernels as `bank_SN`, filled through one byte view per row."""

    def __init__(self, count: int, row_bytes: int, dtype: torch.dtype, poison: bool = False, raw: Tensor | None = None):
        # Not initialised: memory that no row has been loaded into is never touched, and never counts.
        self.bytes = torch.empty((count, row_bytes), dtype=torch.uint8) if raw is None else raw
        if poison:
            self.bytes.fill_(POISON)
        self.bank_SN = self.bytes.view(dtype)
        self.rows = [memoryview(self.bytes[i].numpy()) for i in range(count)]


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
        scratch: Tensor,
        lock: threading.RLock | None = None,
        poison: bool = False,
    ):
        self.bank, self.store, self.transfer, self.poison = bank, store, transfer, poison
        self.lock = lock or threading.RLock()  # that of the model: its layers share the scratch rows
        self.cache = LayerCache(bank.num_experts, slots, policy, bank.name)
        layout = bank.layout
        self.slots = Rows(slots, layout.row_bytes, layout.dtype, poison)
        own = scratch[: scratch.numel() // layout.row_bytes * layout.row_bytes].view(-1, layout.row_bytes)
        self.scratch = Rows(len(own), layout.row_bytes, layout.dtype, raw=own)
        self.module_core: RunCore | None = None  # set where the model is patched; serves `experts`
        self._pending: list[tuple[Load, Ticket]] = []

    # The verbs of a graph.

    def fetch(self, ids_P: Tensor) -> Tensor:
        self._take_back()
        ids = ids_P.reshape(-1).tolist()
        cache = self.cache
        unique = list(dict.fromkeys(ids))
        cache.check(unique)
        for e in ids:
            cache.counters.counts[e] += 1
        loads = cache.lookup(unique, self._tokens(len(ids)))
        if loads:
            self._start(loads)
        slot_of = cache.slot_of
        if not loads:
            slots = [slot_of[e] for e in ids]
        else:
            pending = cache.pending
            slots = [pending[e].slot if e in pending else slot_of[e] for e in ids]
        return torch.tensor(slots, dtype=ids_P.dtype).view(ids_P.shape)

    def wait(self, ticket_P: Tensor) -> Tensor:
        if self._pending:
            self._finish()
        return ticket_P.clone()

    def stream(self, x_P: Tensor, ids_P: Tensor, core: RunCore, others: Sequence[Tensor] = ()) -> Tensor:
        self._take_back()
        ids = ids_P.reshape(-1).tolist()
        used = Counter(ids)
        cache = self.cache
        cache.check(list(used))
        for e, count in used.items():
            cache.counters.counts[e] += count
        tokens = self._tokens(len(ids))
        past: list[int] = []
        if len(ids) <= cache.slots:  # as small as a decode step: it may evict like one
            loads = cache.lookup(list(used), tokens)
        else:  # most used first: those get the free slots
            loads, past = cache.fill([e for e, _ in used.most_common()], tokens)
        if loads:
            self._start(loads)
            self._finish()
        if not past:
            return core(x_P, self._slots_of(ids_P, cache.slot_of), self.slots.bank_SN, others)
        return self._waves(x_P, ids_P, core, others, past)

    def experts(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The whole module, for callers that no pass has rewritten: slower, never wrong."""
        tokens, k = ids_TK.shape
        with self.lock, torch.autocast(x_TH.device.type, enabled=False):
            if self.module_core is None:
                raise closed(self.bank.name)
            out_PH = self.stream(x_TH.repeat_interleave(k, dim=0), ids_TK.reshape(-1), self.module_core)
            weighted_PH = out_PH * weights_TK.reshape(-1, 1)
            return weighted_PH.view(tokens, k, -1).sum(dim=1).to(x_TH.dtype)

    # Loading.

    def prewarm(self, experts: Sequence[int], progress: Callable[[int], object] = lambda n: None) -> None:
        """Fill free slots with `experts`, most wanted first. Stops cleanly at any exception (Ctrl-C)."""
        self._take_back()
        for expert in experts:
            loads = self.cache.prewarm([expert])  # planned one at a time: an interrupt leaves nothing pending
            if loads:
                self._start(loads)
                self._finish(demanded=False)
                progress(1)

    def _start(self, loads: Sequence[Load]) -> None:
        begun = time.perf_counter()
        try:
            for load in loads:
                row = self.slots.rows[load.slot]
                if self.poison:
                    self.slots.bytes[load.slot].fill_(POISON)
                self._pending.append((load, self.transfer.start(self.store, self.bank.index, load.expert, row)))
        except BaseException:
            self._abort()
            raise
        finally:
            self.cache.counters.stall_s += time.perf_counter() - begun

    def _finish(self, demanded: bool = True) -> None:
        begun = time.perf_counter()
        try:
            while self._pending:
                load, ticket = self._pending[0]
                nbytes = self.transfer.wait(ticket)
                self._pending.pop(0)
                self.cache.commit(load, nbytes, demanded)
        except BaseException:
            self._abort()
            raise
        finally:
            self.cache.counters.stall_s += time.perf_counter() - begun

    def _take_back(self) -> None:
        """An event that was interrupted before its wait may have left loads behind; a new one starts clean."""
        if self.cache.pending:
            self._abort()

    def _abort(self) -> None:
        """Give back the slot of every load that has not been committed."""
        self._pending.clear()
        for load in list(self.cache.pending.values()):
            self.cache.abort(load)
            if self.poison:
                self.slots.bytes[load.slot].fill_(POISON)

    def _waves(
        self, x_P: Tensor, ids_P: Tensor, core: RunCore, others: Sequence[Tensor], past: Sequence[int]
    ) -> Tensor:
        cache, size = self.cache, len(self.scratch.rows)
        slots_P = self._slots_of(ids_P, cache.slot_of)
        out_P = None
        for first in range(-size, len(past), size):  # the wave before the first is that of the resident rows
            if first >= 0:
                wave = past[first : first + size]
                self._load_scratch(wave)
                table = [-1] * cache.num_experts
                for i, e in enumerate(wave):
                    table[e] = i
                slots_P = self._slots_of(ids_P, table)
            mine = (slots_P >= 0).nonzero().flatten()
            if len(mine) == 0:
                continue
            source = self.scratch if first >= 0 else self.slots
            part = core(x_P, slots_P, source.bank_SN, others, mine)
            if out_P is None:
                out_P = part.new_empty((len(slots_P), *part.shape[1:]))
            out_P[mine] = part
        if out_P is None:
            raise AssertionError(f"{self.bank.name}: waves without a pair")  # `past` is never empty here
        return out_P

    def _load_scratch(self, wave: Sequence[int]) -> None:
        begun = time.perf_counter()
        try:
            for i, e in enumerate(wave):
                if self.poison:
                    self.scratch.bytes[i].fill_(POISON)
                ticket = self.transfer.start(self.store, self.bank.index, e, self.scratch.rows[i])
                self.cache.count_miss(self.transfer.wait(ticket))
                self.cache.counters.streamed += 1
        finally:
            self.cache.counters.stall_s += time.perf_counter() - begun

    @staticmethod
    def _slots_of(ids_P: Tensor, table: Sequence[int]) -> Tensor:
        return torch.tensor(table, dtype=ids_P.dtype)[ids_P.reshape(-1)]

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
