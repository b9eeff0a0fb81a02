"""The kernels under Triton's interpreter with the elements of every store written in a random order, as the threads of
a block may: wherever two of them write to one place, the result would depend on who is last.

Needs TRITON_INTERPRET=1; `test_interpreted.py` runs it so.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from moe_offload.runtime.kernels import KERNELS, Loads, make_pace, reference
from moe_offload.runtime.kernels.state_block import StateBlock
from tests.runtime.kernels.test_contract import chosen_on_a_gpu
from tests.runtime.kernels.test_decide import Both
from tests.runtime.kernels.test_staging import CHUNK, STAGERS, Layer

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


@pytest.fixture(params=range(3))
def shuffled(request, monkeypatch):
    draw, store = np.random.default_rng(request.param), interpreter._interpreter.store

    class Shuffled:
        def __getattr__(self, name):
            return getattr(interpreter_itself, name)

        def store(self, pointers, values, mask):
            order = draw.permutation(pointers.size)
            store(*(np.ascontiguousarray(x.reshape(-1)[order]) for x in (pointers, values, mask)))

    interpreter_itself = interpreter._interpreter
    monkeypatch.setattr(interpreter, "_interpreter", Shuffled())


def test_decisions_do_not_depend_on_who_writes_first(shuffled):
    draw = random.Random(0)
    both = Both(12, 5, kernels=KERNELS["cuda"]())
    for _ in range(15):
        both.event(draw.sample(range(12), draw.randint(1, 4)))
    both.check()
    assert both.cache.counters.misses > 15


def test_nor_does_the_choice_of_the_best(shuffled):
    state, loads = StateBlock([(12, 6)], "cpu").states[0], Loads.empty(6, "cpu")
    for kinds in (2, 50):
        scores_TE = torch.randint(0, kinds, (2, 12), generator=torch.Generator().manual_seed(kinds)).float()
        pace_2 = make_pace(2, 32.0, "cpu")
        values_TK, ids_TK, slots_P = KERNELS["cuda"]().decide_top(scores_TE, 3, state, loads, pace_2)
        assert ids_TK.tolist() == [chosen_on_a_gpu(row, 3) for row in scores_TE.tolist()]
        assert torch.equal(values_TK, scores_TE.gather(1, ids_TK))
        assert slots_P.tolist() == state.slot_of_E[ids_TK.flatten()].tolist()


def test_gathered_rows_do_not_either(shuffled):
    rows_EN = torch.arange(6.0).repeat_interleave(8).view(6, 8)
    banks = [torch.full((4, 8), torch.nan) for _ in range(2)]
    loads = Loads.empty(3, "cpu")
    loads.expert_P[:2], loads.slot_P[:2], loads.count_1[0] = torch.tensor([5, 1]), torch.tensor([2, 0]), 2
    for kernels, bank_SN in zip((KERNELS["cuda"](), reference), banks, strict=True):
        kernels.gather(rows_EN, bank_SN, loads)
    assert torch.equal(banks[0][[2, 0]], banks[1][[2, 0]]) and banks[0][[1, 3]].isnan().all()


def test_nor_do_staged_rows(shuffled):
    draw = random.Random(0)
    both = [Layer(9, 4, rows=3, columns=4 * CHUNK + 8, resident=[2, 5]) for _ in range(2)]
    for _ in range(4):
        ids, pairs = (
            [draw.randrange(-1, 10) for _ in range(7)],
            list(zip(draw.sample(range(9), 2), (3, 1), strict=True)),
        )
        for layer, stagers in zip(both, (STAGERS["cuda"](), STAGERS["cpu"]()), strict=True):
            layer.guess(stagers, ids)
            layer.load(stagers, pairs)
        assert both[0].everything() == both[1].everything()


@triton.jit
def _two_writers(out, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out + lane // 2, lane)


def test_two_writers_of_one_place_would_be_seen(shuffled):
    out = torch.zeros(8, dtype=torch.int32)
    _two_writers[(1,)](out, SIZE=16)
    assert out.tolist() != [2 * i + 1 for i in range(8)]
