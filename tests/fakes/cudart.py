"""As much of the CUDA runtime as `pinned` asks for, made of Python."""

from __future__ import annotations

import contextlib

import pytest
import torch

from moe_offload.memory.transfer import pinned

NO_MEMORY, NOT_REGISTERED = 2, 713
PAGE = 4096


class Cudart:
    """Registers `most` bytes and no more. `error` is what the next check of anybody's kernel would report."""

    def __init__(self, most=2**40):
        self.most, self.registered, self.error, self.interrupt_at = most, {}, 0, -1

    def cudaHostRegister(self, address, nbytes, flags):
        assert flags == 3 and address not in self.registered
        if len(self.registered) == self.interrupt_at:
            raise KeyboardInterrupt
        if sum(self.registered.values()) + nbytes > self.most:
            self.error = NO_MEMORY
            return NO_MEMORY
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        if self.registered.pop(address, None) is None:
            self.error = NOT_REGISTERED
            return NOT_REGISTERED
        return 0

    def cudaGetErrorString(self, code):
        return {NO_MEMORY: "out of memory"}[code]

    def clear(self):
        self.error = 0


@pytest.fixture
def cuda(monkeypatch):
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(pinned, "clear_last_error", runtime.clear)
    monkeypatch.setattr(pinned, "device_address", lambda address: address if address in runtime.registered else None)
    monkeypatch.setattr(pinned, "PIECE_BYTES", 2 * PAGE)
    return runtime
