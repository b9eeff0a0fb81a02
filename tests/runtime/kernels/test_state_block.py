"""The states of all layers in one block: what one layer is told no other hears; hands change in one copy."""

from __future__ import annotations

import pytest
import torch

from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.runtime.kernels import KERNELS
from moe_offload.runtime.kernels.state_block import ALIGN, StateBlock
from tests.fakes.fake_device import DEVICE, Fabric, Far
from tests.fakes.fault_store import LAYERS, E, make
from tests.fakes.streams import InstantStreams

NAMES = ("slot_of_E", "expert_at_S", "used_E", "unit_1", "counts_E", "totals_4")
SIZES = [(5, 3), (7, 2), (5, 5)]


def test_every_tensor_of_every_layer_has_memory_of_its_own_and_kernels_can_load_it_wide():
    block = StateBlock(SIZES, "cpu")
    for i, state in enumerate(block.states):
        for j, name in enumerate(NAMES):
            tensor = getattr(state, name)
            assert tensor.data_ptr() % (ALIGN if name != "totals_4" else 16) == 0
            tensor.fill_(10 * i + j)
    for i, state in enumerate(block.states):
        assert [sorted(set(getattr(state, name).tolist())) for name in NAMES] == [[10 * i + j] for j in range(6)]
        assert (len(state.slot_of_E), len(state.expert_at_S)) == SIZES[i]
    assert block.totals_L4.tolist() == [[10 * i + 5] * 4 for i in range(3)]


def test_the_mirror_is_the_same_layer_of_the_other_side():
    block = StateBlock(SIZES, "cpu")
    assert block.states[1].slot_of_E.tolist() == [-1] * 7 and float(block.states[1].unit_1) == 1
    block.mirrors[1].used_E.fill_(0.5)
    assert not block.states[1].used_E.any()
    block.send()
    assert block.states[1].used_E.tolist() == [0.5] * 7 and not block.states[0].used_E.any()
    block.states[2].expert_at_S.fill_(4)
    block.fetch()
    assert block.mirrors[2].expert_at_S.tolist() == [4] * 5


def test_a_layer_with_fewer_slots_stays_in_the_block():
    block = StateBlock(SIZES, "cpu")
    state, mirror = block.resize(2, 3)
    mirror.expert_at_S.fill_(1)
    block.send()
    assert state.expert_at_S.tolist() == [1, 1, 1] and state.slot_of_E is block.states[2].slot_of_E
    assert len(block.resize(2, 5)[0].expert_at_S) == 5
    with pytest.raises(AssertionError, match="6 slots"):
        block.resize(2, 6)


def test_decisions_change_hands_in_one_copy_each_way():
    """However many layers there are: each copy would wait for the device, or be a launch."""

    class OnDevice(DeviceTransfer):
        def send(self, values):
            return Far(values.clone())

    with Fabric() as fabric:
        rows = [Far(torch.zeros(E, 1024)) for _ in range(LAYERS)]
        store = HostStore([Far(torch.zeros(E, 4096, dtype=torch.uint8))] * LAYERS)
        runtime, _ = make(3, store, poison=False, transfer=OnDevice(InstantStreams()), device=DEVICE)
        runtime.decide_on_device(dict(enumerate(rows)), 32.0, KERNELS["cpu"]())
        runtime.layers[0].take_over([2])  # makes what events of that size need
        runtime.hand_back()
        for change, copies in ((lambda: runtime.layers[0].take_over([2]), 1), (runtime.hand_back, 1)):
            fabric.waits.clear()
            change()
            assert fabric.waits == ["copy_"] * copies
