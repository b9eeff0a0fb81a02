"""The device states of all layers in one block of memory, and its mirror on the host: one copy each way when decisions
change hands.

    block    on the device   | tables, scores and counts of layer 0 | of layer 1 | ... | totals_L4 | guesses_L4 |
    mirror   on the host     the same bytes, pinned below a GPU

Shapes: L layers, E experts, S slots, B bytes of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .state import DeviceState

ALIGN = 64  # bytes that each tensor begins at a multiple of: kernels load 16 at a time


class StateBlock:
    """`states[l]` and `mirrors[l]` are the same layer's state, on the device and on the host."""

    def __init__(self, sizes: Sequence[tuple[int, int]], device: torch.device | str):
        """`sizes` are the experts and slots of each layer. Every slot is empty, all counts are 0."""
        layers = [_fields(experts, slots) for experts, slots in sizes]
        nbytes = sum(_extent(count, dtype) for fields in layers for count, dtype in fields.values())
        nbytes += 2 * _extent(4 * len(layers), torch.int64)
        device = torch.device(device)
        with torch.inference_mode(False):  # what is made within that mode cannot be written outside of it
            self.block_B = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self.mirror_B = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda", device="cpu")
            self.states, self.totals_L4, self.guesses_L4 = _views(self.block_B, layers)
            self.mirrors, *_ = _views(self.mirror_B, layers)
            for state in self.mirrors:
                state.forget()
                state.unit_1.fill_(1)
        self.send()

    def send(self) -> None:
        """The device has what the mirror has, for what is launched from now on. A GPU is not waited for."""
        self.block_B.copy_(self.mirror_B, non_blocking=True)

    def fetch(self) -> None:
        """The mirror has what the device has, once all that was launched is done. Waits for it."""
        self.mirror_B.copy_(self.block_B)

    def resize(self, layer: int, slots: int) -> tuple[DeviceState, DeviceState]:
        """State and mirror of a layer that has so many slots from now on, at most as many as at first."""
        found = []
        for states in (self.states, self.mirrors):
            if slots > len(states[layer].expert_at_S):
                raise AssertionError(f"{slots} slots, of {len(states[layer].expert_at_S)} that the block was made for")
            found.append(replace(states[layer], expert_at_S=states[layer].expert_at_S[:slots]))
        return found[0], found[1]


def _fields(experts: int, slots: int) -> dict[str, tuple[int, torch.dtype]]:
    """The tensors of a state, but for its totals and what it guessed: how many elements, of which dtype."""
    return {
        "slot_of_E": (experts, torch.int32),
        "expert_at_S": (slots, torch.int32),
        "used_E": (experts, torch.float64),
        "unit_1": (1, torch.float64),
        "counts_E": (experts, torch.int64),
    }


def _extent(count: int, dtype: torch.dtype) -> int:
    return -(-count * dtype.itemsize // ALIGN) * ALIGN


def _views(
    memory_B: Tensor, layers: Sequence[dict[str, tuple[int, torch.dtype]]]
) -> tuple[list[DeviceState], Tensor, Tensor]:
    begin = 0

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal begin
        part = memory_B[begin : begin + count * dtype.itemsize].view(dtype)
        begin += _extent(count, dtype)
        return part

    tensors = [{name: take(*size) for name, size in fields.items()} for fields in layers]
    totals_L4, guesses_L4 = (take(4 * len(layers), torch.int64).view(-1, 4) for _ in range(2))
    states = [DeviceState(**each, totals_4=totals_L4[i], guesses_4=guesses_L4[i]) for i, each in enumerate(tensors)]
    return states, totals_L4, guesses_L4
