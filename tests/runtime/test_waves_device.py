"""A prompt on a device with streams: few launches, one wait a layer, and a link that is never idle for long."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from moe_offload.cache import POLICIES
from moe_offload.cache.layer_cache import Load
from moe_offload.config.settings import OffloadConfig
from moe_offload.errors import RoutingError
from moe_offload.experts import MoELayer, RowLayout
from moe_offload.memory.scratch import Scratch
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.plan.weights import scratch_rows
from moe_offload.runtime.in_flight import Arrival
from moe_offload.runtime.layer import LayerRuntime
from moe_offload.runtime.model import Runtime
from moe_offload.runtime.waves_device import count_uses
from tests.fakes.fake_device import DEVICE, Fabric, Far
from tests.fakes.fault_store import B, E, K, decode, expected, make, prefill, tags
from tests.fakes.streams import InstantStreams


class Spy:
    """A core that says what it was called for: (pairs, whether from the slots)."""

    def __init__(self, layer):
        self.layer, self.calls = layer, []

    def __call__(self, x_P, slots_P, bank_SN, others, pairs_R=None):
        self.calls.append((len(slots_P), bank_SN is self.layer.slots.bank_SN))
        return tags(x_P, slots_P, bank_SN, others, pairs_R)


def on_streams(slots, scratch_rows):
    return make(slots, scratch_rows=scratch_rows, transfer=DeviceTransfer(InstantStreams()))


def test_residents_are_computed_at_once_and_the_rest_a_quarter_of_the_scratch_at_a_time():
    runtime, store = on_streams(slots=2, scratch_rows=8)
    layer = runtime.layers[0]
    ids = [*range(E)] * 3
    prefill(layer, ids)
    before, log = sorted(layer.cache.resident()), len(store.log)
    spy = Spy(layer)
    out = layer.stream(torch.zeros(len(ids), 1), torch.tensor(ids), spy)
    assert torch.equal(out, expected(0, ids))
    assert spy.calls == [(2 * 3, True), (2 * 3, False), (2 * 3, False), (2 * 3, False)]
    assert sorted(layer.cache.resident()) == before, "a prompt does not flush what was there"
    read = [e for index, e in store.log[log:] if index == 0]
    assert sorted(read) == [e for e in range(E) if e not in before], "each once, and what is resident never"


def test_of_what_was_read_ahead_that_goes_first_which_has_a_slot():
    """Neighbours that lie in one buffer are computed by one launch."""
    runtime, _ = on_streams(slots=2, scratch_rows=4)
    arrivals = runtime.layers[0].arrivals
    places = [(None, 0), (Load(1, 0), 1), (Load(2, 1), -1), (None, 2), (Load(4, 1), 3)]
    arrivals.awaited.extend(Arrival(e, load, row, None) for e, (load, row) in enumerate(places))
    assert arrivals.scratch_first() == 4
    assert [one.expert for one in arrivals.awaited] == [1, 4, 0, 3, 2]
    arrivals.awaited.clear()


def test_what_was_read_ahead_leaves_scratch_before_anything_else_is_computed():
    runtime, store = on_streams(slots=2, scratch_rows=4)
    ids = [*range(E)] * 3
    first, second = runtime.layers
    prefill(second, ids)
    prefill(first, ids)
    ahead = runtime.layers[0].arrivals.scratch.ahead
    assert len(ahead) == 4 and all(held.ticket.done.wait(120) for held in ahead.values())
    spy, log = Spy(second), len(store.log)
    second.stream(torch.zeros(len(ids), 1), torch.tensor(ids), spy)
    assert spy.calls == [*[(3, False)] * 4, (2 * 3, True), *[(3, False)] * 2]
    assert len(store.log) - log == E - 2 - 4


def test_rows_of_the_two_buffers_are_never_computed_together():
    """Read ahead for a slot, read ahead for none, into a slot, through scratch: four kinds in one event."""
    runtime, _ = on_streams(slots=4, scratch_rows=8)
    first, second = runtime.layers
    decode(second, [0, 1])
    prefill(first, [*range(E)] * 3)
    ids = [*range(E)] * 3 + [6, 7] * 9
    spy = Spy(second)
    assert torch.equal(second.stream(torch.zeros(len(ids), 1), torch.tensor(ids), spy), expected(1, ids))
    assert sum(pairs for pairs, _ in spy.calls) == len(ids) and {kind for _, kind in spy.calls} == {True, False}


@pytest.mark.parametrize("seed", range(40))
def test_any_prompts_in_any_order(seed):
    draw = random.Random(seed)
    runtime, _ = on_streams(draw.randint(K, E), draw.randint(1, 5))
    for _ in range(5):
        for index, layer in enumerate(runtime.layers):
            some = draw.sample(range(E), draw.randint(1, E))
            ids = [draw.choice(some) for _ in range(draw.randint(1, 60))]
            ids = sorted(ids) if draw.random() < 0.5 else ids
            assert torch.equal(prefill(layer, ids), expected(index, ids))


def test_an_id_that_is_no_expert_s_is_named():
    for ids in ([0, -1, 3], [E, 2], [2**40]):
        with pytest.raises(RoutingError, match=f"expert {next(e for e in ids if not 0 <= e < E)},"):
            prefill(on_streams(3, 2)[0].layers[0], [*range(E), *ids])
    assert count_uses(torch.tensor([3, 1, 3], dtype=torch.int32), E) == Counter({3: 2, 1: 1})


# Who waits.


class FarStreams(InstantStreams):
    def copy(self, target, source, after, background=False):
        target.near.copy_(source)
        return True

    def send(self, values):
        return Far(values.clone())


def far_tags(x_P, slots_P, bank_SN, others, pairs_R=None):
    return bank_SN[slots_P][:, B - 1 : B + 1]


@pytest.mark.parametrize("in_order", [True, False])
def test_the_host_waits_once_a_layer(in_order):
    """For how often each expert is asked for, and for nothing else: whatever it is that would wait is counted."""
    draw = random.Random(0)
    with Fabric() as fabric:
        rows = torch.arange(2 * E).view(2, E, 1).expand(2, E, 4096 // 4).float().contiguous().view(torch.uint8)
        transfer = DeviceTransfer(FarStreams())
        runtime, _ = make(3, HostStore(list(rows)), scratch_rows=4, poison=False, transfer=transfer, device=DEVICE)
        for turn in range(4):
            for index, layer in enumerate(runtime.layers):
                ids = [draw.randrange(E if turn else 2) for _ in range(70)]
                ids = sorted(ids) if in_order else ids
                x_P, ids_P = Far(torch.zeros(len(ids), 1)), Far(torch.tensor(ids))
                fabric.waits.clear()
                out = layer.stream(x_P, ids_P, far_tags)
                assert fabric.waits == ["_to_copy"]
                assert out.near[:, 1].tolist() == [index * E + e for e in ids]
        assert runtime.layers[1].cache.counters.ahead > 0 and runtime.layers[1].cache.counters.streamed > 0
        ids_P = Far(torch.tensor([[1, 5]]))
        for layer in runtime.layers:
            fabric.waits.clear()
            assert layer.wait(layer.fetch(ids_P)).shape == (1, 2)
            assert fabric.waits == ["_to_copy"]
        fabric.waits.clear()
        for wait in (lambda: ids_P.to("cpu"), lambda: ids_P.sum().item(), ids_P.nonzero, ids_P.unique):
            wait()
        assert len(fabric.waits) == 4, "and these would have been seen"
        with pytest.raises(AssertionError, match="of the device and of the host"):
            ids_P[torch.tensor([0])]


# Whether the link is idle: the same code on a clock of its own.


@dataclass
class Machine:
    """Seconds that things take. `launch_s` and `copy_launch_s` of the host: one experts core, one row."""

    row_s: float
    pair_s: float
    dense_s: float
    core_s: float = 20e-6
    launch_s: float = 250e-6
    copy_launch_s: float = 30e-6
    decide_s: float = 1e-3


class Clock:
    """Streams whose work takes the time that `machine` says, none of it real. It has its effect when it is launched."""

    def __init__(self, machine):
        self.machine = machine
        self.begin()

    def begin(self):
        self.host_s = self.compute_s = self.link_s = self.busy_s = 0.0
        self.copies = 0

    def pin(self, buffer):
        pass

    unpin = pin

    def drain(self):
        self.finish(self.link_s)

    def mark(self):
        return self.compute_s

    def copy(self, target, source, after, background=False):
        if background:  # launched and waited for by a thread of its own
            return self._copy_behind(target, source, after)
        self.host_s += self.machine.copy_launch_s
        self.link_s = max(self.link_s, after, self.host_s) + self.machine.row_s
        self.copies += 1
        target.copy_(source)
        return self.link_s

    def _copy_behind(self, target, source, after):
        self.link_s = max(self.link_s, after, self.host_s) + self.machine.row_s
        self.copies += 1
        target.copy_(source)
        return Behind(self.link_s)

    def ended(self, event):
        return event <= self.host_s

    def moment(self):
        return self.compute_s

    def seconds(self, begin, end):
        return end - begin

    def send(self, values):
        return values.clone()

    def current(self):
        return contextlib.nullcontext()

    in_turn = current

    def capturing(self):
        return False

    def order(self, event):
        self.compute_s = max(self.compute_s, event)

    def finish(self, event):
        if not isinstance(event, Behind):
            self.host_s = max(self.host_s, event)

    def kernel(self, duration_s, launch_s):
        self.host_s += launch_s
        self.compute_s = max(self.compute_s, self.host_s) + duration_s
        self.busy_s += duration_s


class Behind(float):
    """The end of a copy that a thread of its own waits for, and not the host."""


class AtOnce(DeviceTransfer):
    """What its threads would do happens when it is asked for: this clock has one thread, and one link in order."""

    _last_demanded = property(lambda self: None, lambda self, copied: None)

    def _queue(self, ticket):
        while ticket.queued:
            ticket.queued.popleft()()
        ticket.nbytes, ticket.unfinished = ticket.finish(), 0
        self._ended(ticket)


QWEN = 9_437_184  # bytes of a row
PCIE_5 = QWEN / 55e9
H100 = Machine(row_s=PCIE_5, pair_s=0.8e-3 / 32768, dense_s=2e-3)
BALANCED = Machine(row_s=PCIE_5, pair_s=12e-3 / 32768, dense_s=4e-3)  # computes as long as the link needs
LATE = Machine(row_s=PCIE_5, pair_s=0.8e-3 / 32768, dense_s=5e-3)


def share_of_the_bound(machine, scratch_rows, layers=8, experts=128, slots=32, pairs=4096 * 8):
    layout = RowLayout.of({"w": torch.zeros(experts, 4)})
    rows = torch.arange(experts).view(-1, 1).expand(experts, layout.row_bytes // 4).float().contiguous()
    store, clock = HostStore([rows.view(torch.uint8)] * layers), Clock(machine)
    transfer = AtOnce(clock)
    scratch = Scratch(torch.zeros(scratch_rows * layout.row_bytes, dtype=torch.uint8), transfer)
    made = [
        LayerRuntime(
            MoELayer(i, (f"layer {i}",), (), experts, 8, layout, layout), slots=slots, store=store, transfer=transfer,
            policy=POLICIES["decayed_lfu"](experts, 32.0), scratch=scratch,
        )
        for i in range(layers)
    ]  # fmt: skip
    runtime = Runtime(made, [store], transfer)

    def core(x_P, slots_P, bank_SN, others, pairs_R=None):
        clock.kernel(machine.core_s + len(slots_P) * machine.pair_s, machine.launch_s)
        return bank_SN[slots_P, :1]

    generator = torch.Generator().manual_seed(0)
    popular_E = torch.rand(experts, generator=generator) + 0.2
    x_P = torch.zeros(pairs, 1)
    for turn in range(2):
        if turn:  # the slots have been filled by the first
            clock.begin()
        for layer in made:
            ids_P = popular_E.multinomial(pairs, replacement=True, generator=generator).sort().values
            clock.kernel(machine.dense_s, machine.launch_s)
            clock.finish(clock.compute_s)  # the ids are read
            clock.host_s += machine.decide_s
            assert torch.equal(layer.stream(x_P, ids_P, core).flatten(), ids_P.float())
    taken_s = max(clock.compute_s, clock.host_s)
    runtime.close()
    return max(clock.busy_s, clock.copies * machine.row_s) / taken_s


@pytest.mark.parametrize("machine", [H100, BALANCED, LATE], ids=["link", "balanced", "late ids"])
def test_the_link_is_busy_while_a_prompt_is_read(machine):
    """4096 tokens of Qwen3-30B-A3B, a quarter resident, the reading of the first layer's rows included."""
    assert share_of_the_bound(machine, scratch_rows(OffloadConfig(), QWEN, "cuda:0")) >= 0.8


def test_one_row_at_a_time_would_leave_it_idle(monkeypatch):
    monkeypatch.setattr("moe_offload.runtime.in_flight.PARTS", 10**9)
    assert share_of_the_bound(H100, 32) < 0.7, "the host launches for longer than the link needs"
