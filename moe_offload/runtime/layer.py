"""What the ops of a graph do at run time: one `LayerRuntime` per MoE layer.

Shapes: T tokens, K experts per token, P = T*K pairs, E experts, S slots, H hidden, N elements of one row.

    prefetch(ids)  a guess at what the layer will be asked for: loads begin in the background
    fetch(ids)     the cache names slots and starts to load what is missing
    wait()         all there, here are the slots
    place(ids)     both at once where the device decides, and the host does not hear of it (device_cache.py); elsewhere
                   it is fetch and wait. place_top(scores, k) chooses the ids as well
    place_ahead(ids)  prefetch where the device decides
    stream(x, ids) the same lookup, but the pairs of resident experts are computed while the missing ones load, and each
                   of those as it arrives; in prefill what has no slot passes through a few scratch rows

It knows no graph and imports no pass.

Longer than 250 lines: the verbs share one cache and one way to fail, and who changes one reads all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..cache import Policy
from ..cache.counters import LayerCounters
from ..cache.layer_cache import LayerCache
from ..errors import RoutingError
from ..experts import MoELayer
from ..memory.buffers import NOTHING, Rows
from ..memory.locking import MemoryLock
from ..memory.process_memory import trim_heap
from ..memory.scratch import Scratch
from ..memory.stores import Store
from ..memory.transfer import Transfer
from ..observe.trace.recorder import TraceRecorder
from .ahead.guesses import Guesses
from .calls import Calls
from .device_cache import DeviceCache, DeviceCaches
from .in_flight import Arrivals
from .joint import Joint
from .lock import ModelLock, closed_error
from .waves_cpu import RunCore, compute_while_loading
from .waves_device import compute_in_groups, count_uses

HEAP_TRIM_TOKENS = 64  # the heap is trimmed after events of as many tokens: it takes ms, fewer leave little behind
HEAP_KEPT_TOKENS = 512  # what more leave behind has no place in the reserve (`plan/budget.py`: HEAP_LIMIT)


class LayerRuntime:
    """One layer: its bank of slots, its cache, and the store its rows rest in."""

    def __init__(
        self,
        moe: MoELayer,
        *,
        slots: int,
        policy: Policy,
        store: Store,
        transfer: Transfer,
        scratch: Scratch,
        lock: ModelLock | None = None,
        poison: bool = False,
        locked: MemoryLock | None = None,
        trims_heap: bool = True,
    ):
        self.moe, self.store, self.trims_heap = moe, store, trims_heap
        self.lock = lock or ModelLock()  # that of the model: its layers share the scratch rows
        self.device, self.poison, self.locked = scratch.raw.device, poison, locked or MemoryLock()
        cache = LayerCache(moe.num_experts, slots, policy, moe.name)
        self.arrivals = Arrivals(moe, cache, self._rows(slots), scratch, store, transfer, poison)
        self.calls = Calls(self.arrivals) if moe.called else None  # where experts are asked for one by one
        self.following: Arrivals | None = None  # for which rows are read ahead; set by `Runtime`
        self.guesses = Guesses()  # of the model; set by `Runtime`
        self.recorder: TraceRecorder | None = None  # of the model, while its trace is recorded
        self.joint = Joint(self.arrivals)  # an event of several requests, where there is one
        self.device_cache: DeviceCache | None = None  # where the device decides
        self.device_caches: DeviceCaches | None = None  # of the model, likewise
        self.module_core: RunCore | None = None  # set where the model is patched; serves `experts`
        self.sorts_pairs = False  # whether its code is given pairs in the order of their experts

    @property
    def cache(self) -> LayerCache:
        return self.arrivals.cache

    @property
    def slots(self) -> Rows:
        return self.arrivals.slots

    # The verbs of a graph.

    def prefetch(self, ids_P: Tensor) -> None:
        trial = self.guesses.trial
        self.arrivals.transfer.refuse_capture(self.moe.name)
        if ids_P.numel() >= self.cache.slots:  # no slot is left for a guess; a prompt leaves none anyway
            trial.skip()
            return
        if self.moe.index == 1:
            trial.step(time.perf_counter())
        if trial.on:
            ids = dict.fromkeys(ids_P.reshape(-1).tolist())
            self.guesses.hold_back(self.arrivals, [e for e in ids if 0 <= e < self.cache.num_experts])

    def fetch(self, ids_P: Tensor) -> Tensor:
        self.arrivals.transfer.refuse_capture(self.moe.name)
        if self.device_cache is not None:  # else this layer is the host's, and those of the device are not touched
            self._hand_back()
        cache, arrivals = self.cache, self.arrivals
        try:
            ids, used = self._event(ids_P)
            loads = cache.lookup(used, self.moe.tokens_of(len(ids)))
            arrivals.claim_guesses(used)
            arrivals.start(loads)
            if self.guesses.waiting:
                self.guesses.start()
        except BaseException:
            arrivals.abort()
            raise
        slot_of, pending = cache.slot_of, cache.pending
        slots = [pending[e].slot if e in pending else slot_of[e] for e in ids] if pending else [slot_of[e] for e in ids]
        return arrivals.transfer.send(torch.tensor(slots, dtype=ids_P.dtype, device="cpu")).view(ids_P.shape)

    def place(self, ids_P: Tensor) -> Tensor:
        if self.device_cache is None:  # the graph was traced for a layer of the device, and Dynamo shares it
            return self.wait(self.fetch(ids_P))
        self._check_in_charge()
        return self.device_cache.place(ids_P)

    def place_top(self, scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.device_cache is None:
            values_TK, ids_TK = torch.topk(scores_TE, k, dim=-1)
            return values_TK, ids_TK, self.place(ids_TK.reshape(-1)).to(torch.int64)
        self._check_in_charge()
        return self.device_cache.place_top(scores_TE, k)

    def place_ahead(self, ids_P: Tensor, slots_Q: Tensor) -> Tensor:
        if self.device_cache is None:  # the graph is shared with a layer of the device, and this one is the host's
            return slots_Q.clone()
        self._check_in_charge()
        return self.device_cache.place_ahead(ids_P, slots_Q)

    def wait(self, slots_P: Tensor) -> Tensor:
        self.arrivals.take_all()
        return slots_P.clone()

    def stream(self, x_P: Tensor, ids_P: Tensor, core: RunCore, others: Sequence[Tensor] = ()) -> Tensor:
        self.arrivals.transfer.refuse_capture(self.moe.name)
        self._hand_back()  # all layers: while this one computes, rows of the next are read ahead
        cache, arrivals, runs_ahead = self.cache, self.arrivals, self.arrivals.transfer.runs_ahead
        ids_P, pairs, tokens = ids_P.reshape(-1), ids_P.numel(), self.moe.tokens_of(ids_P.numel())
        try:
            if self.joint.begun and (out := self.joint.compute(x_P, ids_P, core, others)) is not None:
                return out
            ids, used = self._event(ids_P)
            here, without_slot = sum(used.values()), list[int]()
            if cache.fits(here):
                loads = cache.lookup(used, tokens)
            else:
                loads, without_slot = cache.fill(used, tokens)
            arrivals.claim_guesses(used)
            arrivals.start(loads)
            if self.guesses.waiting:
                self.guesses.start()
            if not arrivals.awaited and not without_slot and here == pairs:
                return core(x_P, self._slots_of(ids_P, ids), self.slots.bank_SN, others)
            if runs_ahead:
                return compute_in_groups(arrivals, self.following, x_P, ids_P, used, core, others, without_slot)
            return compute_while_loading(
                arrivals, self.following, x_P, torch.tensor(ids, device="cpu"), core, others, without_slot
            )
        except BaseException:
            arrivals.abort()
            raise
        finally:
            trims = tokens >= (HEAP_TRIM_TOKENS if self.trims_heap else HEAP_KEPT_TOKENS + 1)
            if trims and not runs_ahead:  # a device's activations are not there
                trim_heap()

    def experts(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The output of the whole experts module, for code that no pass has rewritten: slower, never wrong."""
        tokens, k = ids_TK.shape
        if not self.moe.has_any(ids_TK):
            return torch.zeros_like(x_TH)
        with self.lock.here(), self.arrivals.transfer.current(), torch.autocast(x_TH.device.type, enabled=False):
            if self.module_core is None:
                raise closed_error(self.moe.name)
            ids_P = ids_TK.reshape(-1)
            order_P = ids_P.sort().indices if self.sorts_pairs else torch.arange(len(ids_P), device=ids_P.device)
            sorted_PH = self.stream(x_TH[order_P // k], ids_P[order_P], self.module_core)
            weighted_PH = torch.empty_like(sorted_PH).index_copy_(0, order_P, sorted_PH) * weights_TK.reshape(-1, 1)
            return weighted_PH.view(tokens, k, -1).sum(dim=1).to(x_TH.dtype)

    @property
    def counters(self) -> LayerCounters:
        """What the layer has done so far, whoever decided."""
        if self.device_cache is not None and self.device_caches is not None and self.device_caches.in_charge:
            return self.device_cache.counters()
        return self.cache.counters

    @property
    def resident(self) -> int:
        """How many experts are in slots."""
        if self.device_cache is not None and self.device_caches is not None and self.device_caches.in_charge:
            return int((self.device_cache.state.expert_at_S >= 0).sum())
        return len(self.cache.resident())

    def take_over(self, sizes: Collection[int]) -> None:
        """A graph is about to run in which the device decides, in all layers; its events have so many pairs."""
        if self.device_caches is not None:
            self.device_caches.take_over(sizes)

    def empty(self) -> None:
        """Wait for what is under way, and give the slots back with all that is in them. Then `hold`, or `release`."""
        self.arrivals.abort()
        self.locked.unlock(self.slots.bytes)
        self.arrivals.slots = NOTHING

    def hold(self, slots: int) -> None:
        """So many slots, all empty."""
        self.arrivals.slots = self._rows(slots)
        self.cache.resize(slots)
        if self.device_cache is not None:
            self.device_cache.resize()

    def release(self) -> None:
        """Give the memory back. Nothing may be on its way any more."""
        self.module_core = self.device_cache = self.device_caches = None
        self.locked.unlock(self.slots.bytes, self.arrivals.scratch.raw)
        self.arrivals.slots = self.arrivals.scratch_rows = NOTHING
        self.arrivals.scratch.release()

    def _rows(self, slots: int) -> Rows:
        layout = self.moe.layout
        return self.locked.keep(Rows(slots, layout.row_bytes, layout.dtype, self.poison, device=self.device))

    def _event(self, ids_P: Tensor) -> tuple[list[int], Counter[int]]:
        """The ids of one event, checked, and how often each is there; what is on its way for it has been claimed.

        Of a prompt on a device the host hears no more than the counts, and there are no ids.
        """
        ids_P, pairs = ids_P.reshape(-1), ids_P.numel()
        if self.arrivals.transfer.runs_ahead and pairs > self.moe.num_experts and self.recorder is None:
            ids, used = list[int](), count_uses(ids_P, self.moe.num_experts)
        else:
            ids, used = self.moe.own_uses(ids_P.tolist())
        try:
            self.cache.check(used)
        except RoutingError:
            self._hand_back()  # raises for a layer of the device where it began there: this one may only have followed
            raise
        if self.recorder is not None:
            self.recorder.event(self.moe.index, ids, self.moe.tokens_of(pairs))
        self.arrivals.begin(used)  # last: what it has claimed is given back by whoever called
        return ids, used

    def _check_in_charge(self) -> None:
        if self.device_caches is None or not self.device_caches.in_charge:
            raise AssertionError(f"{self.moe.name}: its graph lets the device decide, and it is not in charge")

    def _hand_back(self) -> None:
        if self.device_caches is not None:
            self.device_caches.hand_back()

    def _slots_of(self, ids_P: Tensor, ids: Sequence[int]) -> Tensor:
        """Where the experts of an event are that are all resident; where the device runs ahead, without its ids."""
        slot_of, transfer = self.cache.slot_of, self.arrivals.transfer
        if transfer.runs_ahead:
            return transfer.send(torch.tensor(slot_of, dtype=ids_P.dtype, device="cpu")).index_select(0, ids_P)
        return torch.tensor([slot_of[e] for e in ids], dtype=ids_P.dtype, device="cpu")
