"""The streams of a GPU, with every use of memory held against every other: no row is read before it is there, replaced
while it is read, or copied out of staging that is being filled; and all that was pinned is unpinned."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.stores.row_read import RowRead
from moe_offload.memory.transfer import staged
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.memory.transfer.streams import CudaStreams
from tests.fakes.cudart import PAGE, cuda  # noqa: F401
from tests.fakes.racing_cuda import Machine, Race

EXPERTS, SLOTS, EVENTS = 6, 3, 60


class Files:
    """A store whose reads are uses of the memory they fill, by the host."""

    def __init__(self, machine):
        self.machine = machine

    def begin(self, layer, expert, row):
        target = torch.frombuffer(row, dtype=torch.uint8)

        def read():
            self.machine.launch("a read", writes=[target], line=self.machine.host)
            row[:] = bytes([expert]) * len(row)

        return RowRead([read], lambda: len(row))


def drive(machine, seed=0):
    """Rows asked for, given up, waited for and read by kernels, in a random order. Returns once all is given back."""
    draw = random.Random(seed)
    transfer, bank = (
        DeviceTransfer(CudaStreams(torch.device("cuda:0")), staging_rows=2),
        torch.zeros(SLOTS, PAGE).byte(),
    )
    rows = HostStore([torch.arange(EXPERTS, dtype=torch.uint8).repeat_interleave(PAGE).view(EXPERTS, PAGE)], pinned={0})
    stores = [rows, Files(machine)]
    try:
        for _ in range(EVENTS):
            with transfer.together(draw.randint(1, 2)) if draw.random() < 0.5 else nullcontext():
                asked = [
                    (slot, expert, transfer.start(draw.choice(stores), 0, expert, bank[slot], draw.random() < 0.6))
                    for slot, expert in zip(draw.sample(range(SLOTS), 2), draw.sample(range(EXPERTS), 2), strict=True)
                ]
            if draw.random() < 0.2:
                transfer.cancel([ticket for _, _, ticket in asked])
                continue
            for slot, expert, ticket in asked:
                if not ticket.demanded and draw.random() < 0.5:
                    transfer.hurry(ticket)
                transfer.wait(ticket)
                machine.launch("a kernel", reads=[bank[slot]])
                assert bank[slot].tolist() == [expert] * PAGE
    finally:
        transfer.close()


@pytest.fixture
def machine(cuda, monkeypatch):  # noqa: F811
    machine = Machine()
    machine.patch(monkeypatch)
    monkeypatch.setattr(staged, "PIECE_BYTES", PAGE // 2)
    return machine


@pytest.mark.parametrize("seed", range(3))
def test_no_two_uses_of_a_row_are_unordered(machine, cuda, seed):  # noqa: F811
    drive(machine, seed)
    assert len(machine.uses) > 100 and {"a copy", "a kernel", "a read"} == {use[-1] for use in machine.uses}
    assert cuda.registered == {} and cuda.error == 0


def copy_at_once(self, target, source, after, background=False):
    return real_copy(self, target, source, torch.cuda.Event(), background)


real_copy = CudaStreams.copy
FAULTS = {
    "a kernel does not wait for a copy": ("order", lambda self, event: None),
    "a copy does not wait for a kernel": ("copy", copy_at_once),
    "staging is filled again before its last copy is over": ("finish", lambda self, event: None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_order_that_is_left_out_is_seen(machine, monkeypatch, name):
    monkeypatch.setattr(CudaStreams, *FAULTS[name])
    with pytest.raises(Race):
        for seed in range(3):
            drive(machine, seed)


@pytest.mark.parametrize("in_turn", [True, False])
def test_callers_on_streams_of_their_own_take_turns_on_the_device(machine, in_turn):
    """A lock orders them on the host. What the one has launched may still read slots that the other fills."""
    streams, bank = CudaStreams(torch.device("cuda:0")), torch.zeros(PAGE, dtype=torch.uint8)
    callers = [torch.cuda.Stream("cuda:0"), machine.compute, torch.cuda.Stream("cuda:0")]

    def call():
        for caller in callers:
            with torch.cuda.stream(caller), streams.in_turn() if in_turn else streams.current():
                machine.launch("a kernel", reads=[bank])
                machine.launch("a copy", writes=[bank])

    if in_turn:
        call()
    else:
        with pytest.raises(Race):
            call()


@pytest.mark.parametrize(("together", "method"), [(False, "copy"), (True, "copy_all")])
def test_a_copy_whose_launch_was_interrupted_is_over_when_its_slot_is_given_back(
    machine, monkeypatch, together, method
):
    """Ctrl-C may come when the copy is under way, and before any ticket knows of its end."""
    transfer, bank = DeviceTransfer(CudaStreams(torch.device("cuda:0")), staging_rows=2), torch.zeros(2, PAGE).byte()
    rows = HostStore([torch.ones(EXPERTS, PAGE, dtype=torch.uint8)], pinned={0})
    launch = getattr(CudaStreams, method)

    def interrupted(*args, **kwargs):
        launch(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(CudaStreams, method, interrupted)
    with pytest.raises(KeyboardInterrupt), transfer.together(2) if together else nullcontext():
        for slot in range(2):
            transfer.start(rows, 0, slot, bank[slot])
    machine.launch("a kernel that fills it anew", writes=[bank])
    transfer.close()
