"""What every entry of STAGERS promises: which guessed rows are staged, what is copied of them, and that a row has the
same bytes wherever its chunks came from. Under Triton's interpreter `test_interpreted.py` runs it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.cache.counters import LayerCounters
from moe_offload.runtime.kernels import KERNELS, Loads, make_pace, reference
from moe_offload.runtime.kernels.staging import STAGERS, Stagers, Staging
from moe_offload.runtime.kernels.staging import reference as staged
from moe_offload.runtime.kernels.staging.state import CHUNK, PROGRAMS
from moe_offload.runtime.kernels.state_block import StateBlock
from tests.runtime.kernels.test_contract import INTERPRETED, bits, fill, poisoned, tagged_rows

LONG = 9000 * 2  # float32 columns of a row of more than four chunks


@dataclass(frozen=True)
class Entry:
    stagers: Stagers
    device: str


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in STAGERS),
        "interpreted",
    ],
)
def entry(request):
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and no TRITON_INTERPRET")
    if request.param != "interpreted":
        return Entry(STAGERS[request.param](), request.param)
    pytest.importorskip("triton")
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    return Entry(STAGERS["cuda"](), "cpu")


def test_there_is_a_set_for_each_kind_of_device_that_has_kernels():
    assert STAGERS.keys() == KERNELS.keys()


class Layer:
    """One layer's state, rows, slots and staging, on one device."""

    def __init__(self, experts, slots, rows, columns=8, device="cpu", resident=()):
        self.device = device
        self.state = StateBlock([(experts, slots)], device).states[0]
        self.staging = Staging.empty(rows, device)
        self.rows_EN = tagged_rows(experts, columns, torch.float32, device)
        self.scratch_GN, self.bank_SN = (poisoned(n, columns, torch.float32, device) for n in (rows, slots))
        for slot, e in enumerate(resident):
            self.state.slot_of_E[e], self.state.expert_at_S[slot] = slot, e
            self.bank_SN[slot] = self.rows_EN[e].to(device)

    def guess(self, stagers, ids, stops=False):
        slots_Q = torch.arange(len(ids) % 4 + 1, device=self.device) + 5
        same_Q = stagers.choose(torch.tensor(ids, device=self.device), slots_Q, self.state, self.staging)
        assert torch.equal(same_Q, slots_Q) and same_Q.data_ptr() != slots_Q.data_ptr()
        if stops:
            self.staging.stop_1.fill_(1)
        stagers.stage(self.rows_EN, self.scratch_GN, self.staging)

    def load(self, stagers, pairs, size=4):
        loads = Loads.empty(size, self.device)
        fill(loads, pairs)
        stagers.gather_staged(self.rows_EN, self.scratch_GN, self.bank_SN, loads, self.state, self.staging)

    @property
    def chosen(self):
        return self.staging.expert_G.tolist(), int(self.staging.count_1)

    def everything(self):
        staging = [x.tolist() for x in vars(self.staging).values()]
        return staging, self.state.guesses_4.tolist(), bits(self.scratch_GN).tolist(), bits(self.bank_SN).tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_staged_are_the_first_that_exist_and_have_no_slot_each_once(entry, dtype):
    layer = Layer(9, 3, rows=3, device=entry.device, resident=[4, 7])
    for ids, want in (
        ([7, 5, 4, 2], ([5, 2, -1], 2)),
        ([5, 5, 5, 0], ([5, 0, -1], 2)),
        ([8, 6, 5, 3, 1], ([8, 6, 5], 3)),
        ([4], ([-1] * 3, 0)),
        ([-1, 9, 2**31 - 1, -(2**31), 3], ([3, -1, -1], 1)),
    ):
        wide_P2 = torch.tensor([ids, ids], dtype=dtype, device=entry.device).T.contiguous()  # every other number
        layer.staging.stop_1.fill_(1)
        before = layer.state.slot_of_E.tolist(), layer.state.counts_E.tolist()
        entry.stagers.choose(wide_P2[:, 0], layer.state.slot_of_E[:2].long(), layer.state, layer.staging)
        assert layer.chosen == want and int(layer.staging.stop_1) == 0
        assert before == (layer.state.slot_of_E.tolist(), layer.state.counts_E.tolist()), "a guess is no use"
    layer.staging.on_1.zero_()
    layer.guess(entry.stagers, [5, 2])
    assert layer.chosen == ([-1] * 3, 0) and not any(layer.staging.reached_R)
    assert layer.scratch_GN.isnan().all(), "switched off, nothing is copied"


def test_staged_rows_are_whole_and_nothing_else_is_written(entry):
    layer = Layer(6, 2, rows=3, columns=LONG, device=entry.device)
    layer.guess(entry.stagers, [5, 1])
    assert torch.equal(bits(layer.scratch_GN[:2]), bits(layer.rows_EN[[5, 1]]))
    assert layer.scratch_GN[2].isnan().all()
    assert layer.staging.reached_R.tolist() == [1] * 10 + [0] * (PROGRAMS - 10)


def test_a_copy_that_is_stopped_before_it_begins_copies_nothing(entry):
    layer = Layer(6, 2, rows=2, columns=LONG, device=entry.device)
    layer.guess(entry.stagers, [5, 1], stops=True)
    assert layer.scratch_GN.isnan().all() and not any(layer.staging.reached_R.tolist())
    layer.load(entry.stagers, [(5, 1)])
    assert torch.equal(bits(layer.bank_SN[1]), bits(layer.rows_EN[5])) and layer.bank_SN[0].isnan().all()
    assert layer.state.guesses_4.tolist() == [2, 1, 1, 0], "guessed, asked for, late; nothing was copied in vain"


def test_what_is_staged_is_taken_from_there(entry):
    """Rows in scratch that are told from those of the host: only so it shows which were read."""
    layer = Layer(8, 3, rows=3, columns=LONG, device=entry.device)
    layer.guess(entry.stagers, [6, 2, 3])
    layer.scratch_GN.mul_(-1)
    layer.load(entry.stagers, [(2, 0), (5, 2)])
    assert torch.equal(layer.bank_SN[0].cpu(), -layer.rows_EN[2].cpu())
    assert torch.equal(layer.bank_SN[2].cpu(), layer.rows_EN[5].cpu()) and layer.bank_SN[1].isnan().all()
    assert layer.state.guesses_4.tolist() == [3, 1, 0, 2 * 4 * LONG]


def test_half_a_row_comes_from_each_place(entry):
    layer = Layer(8, 3, rows=2, columns=LONG, device=entry.device)
    layer.guess(entry.stagers, [6, 2])
    layer.scratch_GN.mul_(-1)
    layer.staging.reached_R[7:] = 0  # as if it had been stopped after 7 chunks: all 5 of the first row, 2 of the second
    layer.load(entry.stagers, [(2, 1), (6, 0)])
    columns = 2 * 2 * CHUNK
    want = layer.rows_EN[2].cpu().clone()
    want[:columns] *= -1
    assert torch.equal(layer.bank_SN[1].cpu(), want) and torch.equal(layer.bank_SN[0].cpu(), -layer.rows_EN[6].cpu())
    assert layer.state.guesses_4.tolist() == [2, 2, 1, 0]


@st.composite
def guesses(draw):
    experts, columns = draw(st.integers(1, 9)), draw(st.sampled_from([4, 4 * CHUNK, 10004]))
    slots, rows = draw(st.integers(1, experts)), draw(st.integers(1, 5))
    ids = st.integers(-1, experts)
    loads = draw(st.lists(st.integers(0, experts - 1), max_size=min(4, slots), unique=True))
    reached = draw(st.lists(st.integers(0, 1), min_size=PROGRAMS, max_size=PROGRAMS))
    resident = draw(st.lists(st.integers(0, experts - 1), max_size=slots, unique=True))
    return experts, slots, rows, columns, draw(st.lists(ids, min_size=1, max_size=9)), loads, reached, resident


@settings(max_examples=30, deadline=None)
@given(guesses())
def test_any_staged_guess(entry, drawn):
    """To the bit as the reference; and the rows are right, however far the copy had come."""
    experts, slots, rows, columns, ids, loads, reached, resident = drawn
    both = [Layer(experts, slots, rows, columns, device, resident) for device in ("cpu", entry.device)]
    pairs = [(e, slot) for slot, e in enumerate(sorted(loads))]
    for layer, stagers in zip(both, (STAGERS["cpu"](), entry.stagers), strict=True):
        layer.guess(stagers, ids)
        layer.staging.reached_R.mul_(torch.tensor(reached, dtype=torch.int32, device=layer.device))
        layer.load(stagers, pairs)
        for e, slot in pairs:
            assert torch.equal(bits(layer.bank_SN[slot]), bits(layer.rows_EN[e]))
    assert both[0].everything() == both[1].everything()


def test_more_chunks_than_programs(entry):
    """Each has several: which are there follows from how many each of them has."""
    rows = 16
    layer = Layer(rows, rows, rows=rows, columns=LONG, device=entry.device)
    layer.guess(entry.stagers, list(range(rows)))
    assert layer.staging.reached_R.tolist() == [2] * (5 * rows - PROGRAMS) + [1] * (2 * PROGRAMS - 5 * rows)
    layer.scratch_GN.mul_(-1)
    layer.staging.reached_R.clamp_(max=1)  # 64 chunks: twelve rows and four chunks
    layer.load(entry.stagers, [(e, e) for e in range(10, 15)], size=8)
    assert torch.equal(layer.bank_SN[10:12].cpu(), -layer.rows_EN[10:12].cpu())
    assert torch.equal(layer.bank_SN[12, : 8 * CHUNK].cpu(), -layer.rows_EN[12, : 8 * CHUNK].cpu())
    assert torch.equal(layer.bank_SN[12, 8 * CHUNK :].cpu(), layer.rows_EN[12, 8 * CHUNK :].cpu())
    assert torch.equal(layer.bank_SN[13:15].cpu(), layer.rows_EN[13:15].cpu())
    assert layer.state.guesses_4.tolist() == [16, 5, 3, 10 * 4 * LONG]


def test_staged_rows_that_do_not_fit_are_refused(entry):
    if entry.stagers.stage is staged.stage:
        pytest.skip("copies any rows")
    layer = Layer(4, 2, rows=2, device=entry.device)
    layer.scratch_GN = poisoned(2, 16, torch.float32, entry.device)
    with pytest.raises(ValueError, match="scratch rows of 64 bytes"):
        layer.load(entry.stagers, [(1, 1)])


def test_decisions_with_guesses_are_those_without(entry):
    """Slots, scores, hits and misses: the same to the bit, right guesses or wrong ones."""
    draw = random.Random(4)
    alone, kernels = Layer(12, 5, rows=2), KERNELS["cpu"]()
    guessed = Layer(12, 5, rows=2, device=entry.device)
    pace_2, seen = make_pace(1, 32.0, "cpu"), 0
    for turn in range(40):
        ids = draw.sample(range(12), 3)
        guessed.guess(entry.stagers, ids if turn % 2 else draw.sample(range(12), 3))
        slots, loads = [], Loads.empty(3, "cpu")
        for layer in (alone, guessed):
            state = StateBlock([(12, 5)], "cpu").states[0]  # where this machine decides, whatever device is tested
            for name, there in vars(layer.state).items():
                getattr(state, name).copy_(there)
            slots.append(kernels.decide(torch.tensor(ids), state, loads, pace_2).tolist())
            for name, there in vars(layer.state).items():
                there.copy_(getattr(state, name))
            count = int(loads.count_1)
            pairs = list(zip(loads.expert_P.tolist()[:count], loads.slot_P.tolist()[:count], strict=True))
            layer.load(entry.stagers if layer is guessed else STAGERS["cpu"](), pairs, size=3)
        assert slots[0] == slots[1] and torch.equal(bits(guessed.bank_SN[slots[1]]), bits(guessed.rows_EN[ids]))
        for name, there in vars(alone.state).items():
            if name != "guesses_4":
                assert there.tolist() == getattr(guessed.state, name).tolist(), name
        seen += count
    rows, used, late, wasted = guessed.state.guesses_4.tolist()
    assert seen > 40 and rows > used > 20 and late == 0 and wasted == (rows - used) * guessed.rows_EN[0].nbytes


def test_what_was_guessed_shows_in_the_counters_once():
    layer = Layer(8, 3, rows=3)
    known = LayerCounters(counts=[0] * 8, ahead=5, late=2, wasted_bytes=100)
    layer.state.guesses_4.copy_(torch.tensor([50, 8, 3, 164]))
    got = layer.state.counters(known, 2, 10)
    assert (got.ahead, got.late, got.wasted_bytes, got.bytes_read, got.hits) == (8, 3, 164, 0, 0)


SYNCHRONISES = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}


def test_no_guess_waits_for_the_device():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    layer, ids_P, loads = Layer(8, 3, rows=3), torch.tensor([3, 5]), Loads.empty(2, "cpu")
    with Listen():
        staged.choose(ids_P, ids_P, layer.state, layer.staging)
        staged.stage(layer.rows_EN, layer.scratch_GN, layer.staging)
        staged.gather_staged(layer.rows_EN, layer.scratch_GN, layer.bank_SN, loads, layer.state, layer.staging)
        reference.gather(layer.rows_EN, layer.bank_SN, loads)
    assert len(seen) > 20 and not seen & SYNCHRONISES
