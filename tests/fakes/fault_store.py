"""A runtime of two layers over a store that fails on cue. Rows say which expert they are, so a wrong one shows.

Shapes: P token-expert pairs, E experts, S slots, K experts per token.
"""

from __future__ import annotations

import torch

from moe_offload.cache import POLICIES
from moe_offload.errors import ClosedError, ExpertReadError
from moe_offload.experts import MoELayer, RowLayout
from moe_offload.memory.scratch import Scratch
from moe_offload.memory.stores.row_read import RowRead
from moe_offload.memory.transfer.threads import ThreadTransfer
from moe_offload.runtime.layer import LayerRuntime
from moe_offload.runtime.model import Runtime
from tests.cache.test_layer_cache import check

E, K, LAYERS = 8, 2, 2
LAYOUT = RowLayout.of({"w": torch.zeros(E, 3), "b": torch.zeros(E, 1)})
B = LAYOUT.fields[1].offset // 4  # where in a row (of float32) the second field is


class FaultStore:
    """Expert e of layer l has 100 l + e in every element. Read number `at` (from 1) meets `fault`, as do later ones if
    `lasting`: an exception to raise, or "short": half of the row, then an error. `log` has every read."""

    def __init__(self, at=0, fault=None, lasting=False):
        self.at, self.fault, self.lasting = at, fault, lasting
        self.log, self.closed = [], 0

    def begin(self, layer, expert, row):
        return RowRead([lambda: None], lambda: self.read(layer, expert, row))

    def read(self, layer, expert, row):
        if self.closed:
            raise ClosedError("closed")
        self.log.append((layer, expert))
        data = memoryview(torch.full((LAYOUT.row_bytes // 4,), 100.0 * layer + expert).numpy()).cast("B")
        if self.fault is not None and (len(self.log) == self.at or (self.lasting and len(self.log) >= self.at)):
            row[: len(row) // 2] = data[: len(row) // 2]
            raise ExpertReadError("truncated") if self.fault == "short" else self.fault
        row[:] = data
        return len(row)

    def close(self):
        self.closed += 1


def make(slots=3, store=None, scratch_rows=1, poison=True, threads=1, transfer=None, device="cpu"):
    store = FaultStore() if store is None else store
    transfer, layers = transfer or ThreadTransfer(threads), []
    scratch = Scratch(torch.zeros(scratch_rows * LAYOUT.row_bytes, dtype=torch.uint8, device=device), transfer, poison)
    for index in range(LAYERS):
        moe = MoELayer(index, (f"layer {index}",), (), E, K, LAYOUT, LAYOUT)
        policy = POLICIES["decayed_lfu"](E, 32.0)
        options = {"slots": slots, "policy": policy, "store": store, "transfer": transfer, "scratch": scratch}
        layers.append(LayerRuntime(moe, **options, poison=poison))
    return Runtime(layers, [store], transfer), store


def tags(x_P, slots_P, bank_SN, others, pairs_R=None):
    """A core whose result is each pair's row: (first element, last element of the second field)."""
    assert pairs_R is None or len(x_P[pairs_R]) == len(slots_P)
    assert bool((slots_P >= 0).all())
    return bank_SN[slots_P][:, [0, B]]


def expected(layer, ids):
    return torch.tensor([[100.0 * layer + e] * 2 for e in ids]).view(-1, 2)


def decode(layer, ids):
    slots_P = layer.wait(layer.fetch(torch.tensor(ids, dtype=torch.int64)))
    assert slots_P.dtype == torch.int64
    return tags(None, slots_P, layer.slots.bank_SN, ())


def prefill(layer, ids):
    return layer.stream(torch.zeros(len(ids), 1), torch.tensor(ids, dtype=torch.int64), tags)


def run(layer, ids):
    """As the passes would: one lookup where the pairs fit the slots, else a stream."""
    return decode(layer, ids) if len(ids) <= layer.cache.slots else prefill(layer, ids)


def assert_sound(layer):
    check(layer.cache)
    assert not layer.cache.pending and not layer.arrivals.awaited
    for e in layer.cache.resident():
        row = layer.slots.bank_SN[layer.cache.slot_of[e]]
        assert bool((row == 100.0 * layer.moe.index + e).all()), f"slot of expert {e} holds something else"
