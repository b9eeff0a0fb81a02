"""Pinning as far as it goes, against a runtime that refuses; tests/gpu has the real one."""

from __future__ import annotations

import pytest
import torch

from moe_offload.kernels import pinned


class Cudart:
    """The bindings that torch has: no more of the runtime can be called."""

    def __init__(self, code):
        self.code = code

    def cudaHostRegister(self, pointer, nbytes, flags):
        return self.code

    def cudaHostUnregister(self, pointer):
        return self.code

    def cudaGetErrorString(self, code):
        return f"refused with {code}"


@pytest.mark.parametrize("verb", [pinned._register, pinned.unpin])
def test_an_error_is_cleared_by_a_launch_that_meets_it(verb, monkeypatch):
    launches = []

    def launch(*_, **options):
        launches.append(options)
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(2))
    monkeypatch.setattr(torch, "full", launch)
    assert verb(torch.empty(2, 4096, dtype=torch.uint8)) in (None, "refused with 2")
    assert launches == [{"device": "cuda"}]


def test_what_torch_calls_of_the_runtime_is_there():
    bound = getattr(torch._C, "_cudart", None)
    if bound is None:
        pytest.skip("this torch was built without CUDA")
    assert all(hasattr(bound, name) for name in vars(Cudart) if name.startswith("cuda"))
