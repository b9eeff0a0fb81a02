"""What the ops promise to a compiler: the fake result has the dtype, shape and strides of the real one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from passes import ops


class Layer:
    """Serves as the runtime does: `place` by kernels, which give int64; `fetch` in the dtype of the ids."""

    def fetch(self, ids_P):
        return ids_P.reshape(-1).clone().view(ids_P.shape)

    def place(self, ids_P):
        return ids_P.reshape(-1).to(torch.int64).view(ids_P.shape)

    def wait(self, slots_P):
        return slots_P.clone()

    def experts(self, x_TH, ids_TK, weights_TK):
        return torch.zeros(x_TH.shape, dtype=x_TH.dtype)


@pytest.fixture
def bank():
    bank = torch.zeros(4, 8)
    ops.bind(bank, Layer())
    yield bank
    ops.unbind(bank)


def test_memory_that_was_given_back_leads_to_no_layer():
    """The next tensor there may be another layer's bank, or a copy that a compiler has made."""
    memory = torch.zeros(4, 8)
    bank = memory.view(4, 8)
    ops.bind(bank, Layer())
    ids = torch.arange(3)
    assert ops.place(ids, memory).tolist() == [0, 1, 2], "the same memory, whoever asks"
    del bank
    with pytest.raises(RuntimeError, match="nothing is bound to"):
        ops.place(ids, memory)
    with pytest.raises(RuntimeError, match="copied"):
        ops.place(ids, memory.clone())
    ops.unbind(memory)


def looks(x):
    return x.dtype, tuple(x.shape), x.stride()


@pytest.mark.parametrize("op", [ops.fetch, ops.place, ops.wait])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("transposed", [False, True])
def test_slots_are_what_a_compiler_was_told(op, dtype, transposed, bank):
    ids = torch.arange(6, dtype=dtype).view(2, 3)
    ids = ids.T if transposed else ids
    with FakeTensorMode() as mode:
        told = op(mode.from_tensor(ids), mode.from_tensor(bank))
    assert looks(op(ids, bank)) == looks(told)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_output_of_experts_is_what_a_compiler_was_told(transposed, bank):
    x, ids = torch.zeros(3, 3), torch.zeros(3, 2, dtype=torch.int64)
    x, weights = x.T if transposed else x, torch.zeros(3, 2)
    with FakeTensorMode() as mode:
        told = ops.experts(*(mode.from_tensor(one) for one in (x, ids, weights, bank)))
    assert looks(ops.experts(x, ids, weights, bank)) == looks(told)
