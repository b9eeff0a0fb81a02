"""What every entry of KERNELS promises, and the Triton kernels once more under Triton's interpreter, on the CPU:

TRITON_INTERPRET=1 python -m pytest tests/kernels          wherever Triton can be imported; slower by far
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
import sys
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload import Trace
from moe_offload.errors import OffloadError
from moe_offload.runtime.kernels import KERNELS, Kernels, Loads, make_pace, reference
from moe_offload.runtime.kernels.state_block import StateBlock
from tests.runtime.kernels.test_decide import TRACES, Both

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Entry:
    kernels: Kernels
    device: str

    def both(self, *sizes, **settings):
        return Both(*sizes, kernels=self.kernels, device=self.device, **settings)


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in KERNELS),
        "interpreted",
    ],
)
def entry(request):
    name = request.param
    if name == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and no TRITON_INTERPRET")
    if name == "interpreted":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("needs TRITON_INTERPRET=1")
        multiply_bfloat16()
        round_bfloat16()
        return Entry(KERNELS["cuda"](), "cpu")
    return Entry(KERNELS[name](), name)


def multiply_bfloat16():
    """Triton's interpreter (3.6) multiplies the bit patterns of bfloat16 as if they were whole numbers."""
    from triton.runtime import interpreter

    right = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *how):
        return right(
            self, *(self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)), d, *how
        )

    tl = interpreter.tl
    interpreter.InterpreterBuilder.create_dot = create_dot


def round_bfloat16():
    """It also cuts off where a GPU rounds to the nearest (cvt.rn), and loses subnormals."""
    from triton.runtime import interpreter

    right, tl = interpreter.InterpreterBuilder.cast_impl, interpreter.tl

    def cast(self, x, to):
        if (x.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16).numpy()
        elif (x.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            data = (x.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            return right(self, x, to)
        return interpreter.TensorHandle(data, to.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast


# decide: against layer_cache.py


def test_a_thousand_random_events(entry):
    draw = random.Random(2)
    both = entry.both(24, 9)
    for i in range(1000):
        if i % 200 == 0:
            hot = draw.sample(range(24), 8)
        tokens = draw.choice([1, 1, 1, 2])
        k = draw.randint(1, 4)
        rows = [draw.sample(hot if draw.random() < 0.8 else range(24), k) for _ in range(tokens)]
        both.event([e for row in rows for e in row], tokens)
    both.check()
    assert 100 < both.cache.counters.misses < both.cache.counters.hits


@pytest.mark.parametrize("name", ["gpt-oss-20b_decode_dev", "qwen3-30b-a3b_k6_bigmoeonedge"])
@pytest.mark.parametrize("residency", [0.25, 0.5])
def test_recorded_routing(entry, name, residency):
    trace = Trace.load(TRACES / f"{name}.npz")
    layer = trace.experts_TLK.shape[1] // 2
    both = entry.both(trace.num_experts[layer], int(trace.num_experts[layer] * residency))
    for row in trace.experts_TLK[:150, layer].tolist():
        both.event([e for e in row if e >= 0])
    both.check()
    assert both.cache.counters.misses > both.cache.slots  # and some gave way


def test_scores_are_renormalised(entry):
    both = entry.both(6, 3, half_life=0.25)  # the unit grows by 2 ** 4 a token: it is full after 50
    for i in range(60):
        both.event([i % 5, (i + 2) % 5])
    both.check()
    assert both.cache.policy.rate.unit < 2.0**50


@st.composite
def small_events(draw):
    experts = draw(st.integers(1, 9))
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, min(3, experts))), min_size=1, max_size=6))
    ids = st.integers(0, experts - 1)
    events = [[draw(st.lists(ids, min_size=k, max_size=k, unique=True)) for _ in range(tokens)] for tokens, k in shapes]
    least = max(tokens * k for tokens, k in shapes)
    return experts, draw(st.integers(least, least + 3)), draw(st.floats(0.1, 1e4)), events


@settings(max_examples=25)
@given(small_events())
def test_any_small_events(entry, drawn):
    experts, slots, half_life, events = drawn
    both = entry.both(experts, slots, half_life=half_life)
    for rows in events:
        both.event([e for row in rows for e in row], len(rows))
    both.check()


# decide: against the reference, where layer_cache.py has no answer or the sizes are large


@pytest.mark.parametrize(
    ("experts", "slots", "pairs", "events"), [(10, 6, 4, 60), (128, 100, 96, 4), (60, 512, 512, 2), (512, 512, 512, 2)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_in_and_out_of_range(entry, experts, slots, pairs, events, dtype):
    """Bad ones are counted, compute with slot 0, and change nothing else; on a GPU none may reach an address."""
    draw = random.Random(3)
    bad = [-1, experts, -(2**31), 2**31 - 1] + [2**31, 2**32, -(2**40)] * (dtype == torch.int64)
    want, got = (Event(experts, slots, pairs, device) for device in ("cpu", entry.device))
    refused = 0
    for _ in range(events):
        ids = [draw.randrange(experts) if draw.random() < 0.9 else draw.choice(bad) for _ in range(pairs)]
        refused += sum(id not in range(experts) for id in ids)
        wide_P2 = torch.tensor([ids, ids], dtype=dtype).T.contiguous()  # a column of it, as a slice of sorted ids is
        slots_P = want.decide(reference, wide_P2[:, 0])
        assert torch.equal(slots_P, got.decide(entry.kernels, wide_P2.to(entry.device)[:, 0]).cpu())
        assert all((slot == 0) or id in range(experts) for id, slot in zip(ids, slots_P.tolist(), strict=True))
        assert want.tensors() == got.tensors()
    assert got.state.totals_4.tolist()[3] == refused > 0


class Event:
    """A state, and the loads of its last event."""

    def __init__(self, experts, slots, pairs, device):
        self.state, self.loads = StateBlock([(experts, slots)], device).states[0], Loads.empty(pairs, device)
        self.pace_2 = make_pace(2, 3.0, device)

    def decide(self, kernels, ids_P):
        return kernels.decide(ids_P, self.state, self.loads, self.pace_2)

    def decide_top(self, kernels, scores_TE, k):
        return kernels.decide_top(scores_TE, k, self.state, self.loads, self.pace_2)

    def tensors(self):
        return [getattr(part, field.name).tolist() for part in (self.state, self.loads) for field in fields(part)]


# decide_top: against the same reference, and equal scores against what torch does on a GPU


@pytest.mark.parametrize(("experts", "k", "tokens"), [(9, 2, 3), (128, 8, 2), (40, 32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_experts_get_their_slots(entry, experts, k, tokens, dtype):
    pairs, draw = k * tokens, torch.Generator().manual_seed(0)
    want, got = (Event(experts, max(pairs, experts // 2), pairs, device) for device in ("cpu", entry.device))
    for _ in range(5):
        order_TE = torch.stack([torch.randperm(experts, generator=draw) for _ in range(tokens)])
        wide_ET = (order_TE - experts / 3).to(dtype).T.contiguous()  # as a router's transposed product would be
        given = [part.tolist() for part in want.decide_top(reference, wide_ET.T, k)]
        assert given == [part.tolist() for part in got.decide_top(entry.kernels, wide_ET.to(entry.device).T, k)]
        assert want.tensors() == got.tensors()


@pytest.mark.parametrize(("experts", "k", "kinds"), [(8, 2, 3), (128, 8, 6), (60, 32, 9), (33, 1, 2)])
def test_of_equal_scores_those_are_chosen_that_a_gpu_chooses(entry, experts, k, kinds):
    if entry.kernels.decide_top is reference.decide_top:
        pytest.skip("torch itself, which chooses others on a CPU")
    draw = torch.Generator().manual_seed(1)
    scores_TE = torch.randint(-kinds, kinds, (4, experts), generator=draw).float()
    scores_TE[0].masked_fill_(scores_TE[0] == 1, torch.nan)
    scores_TE[1].masked_fill_(scores_TE[1] == 1, -0.0)
    event = Event(experts, 4 * k, 4 * k, entry.device)
    values_TK, ids_TK, _ = event.decide_top(entry.kernels, scores_TE.to(entry.device), k)
    want = [chosen_on_a_gpu(row, k) for row in scores_TE.tolist()]
    assert ids_TK.tolist() == want
    assert torch.equal(bits(values_TK), bits(scores_TE.gather(1, torch.tensor(want))))


def chosen_on_a_gpu(scores, k):
    """torch.topk of one row as its CUDA source has it, a thread at a time: gatherTopK of TensorTopK.cu, then
    bitonicSortKVInPlace of SortUtils.cuh with 16 threads."""
    order = [sortable(score) for score in scores]
    least = sorted(order, reverse=True)[k - 1]
    ids = [i for i, one in enumerate(order) if one > least]
    ids += [i for i, one in enumerate(order) if one == least][: k - len(ids)]
    places = [(scores[i], i, True) for i in ids] + [(0.0, 0, False)] * (32 - k)

    def step(stride, turned):
        for thread in range(16):
            at = 2 * thread - (thread & (stride - 1))
            (a, _, a_valid), (b, _, b_valid) = places[at], places[at + stride]
            greater = a > b or (a != a and b == b)
            if ((greater and a_valid) or not b_valid) == turned(thread):
                places[at], places[at + stride] = places[at + stride], places[at]

    for size in (2, 4, 8, 16):
        for stride in (size >> i for i in range(1, size.bit_length())):
            step(stride, lambda thread, size=size: bool(thread & (size // 2)))
    for stride in (16, 8, 4, 2, 1):
        step(stride, lambda thread: False)
    return [i for _, i, _ in places[:k]]


def sortable(score):
    number = struct.unpack("i", struct.pack("f", score))[0]
    return 2**31 - 1 if score != score else number if number >= 0 else number ^ (2**31 - 1)


def test_more_experts_of_a_token_than_the_kernel_sorts_are_torchs_choice():
    pytest.importorskip("triton")
    assert not KERNELS["cuda"]().chooses_as_torch(64, 33, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device, and no TRITON_INTERPRET")
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (64, 6), (128, 8), (256, 8), (512, 10)])
def test_torch_chooses_so_on_this_gpu(experts, k):
    assert KERNELS["cuda"]().chooses_as_torch(experts, k, torch.device("cuda", 0))


# gather


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [8, 9000])  # much less than a program copies at once; a little more than twice
def test_gathered_rows_are_whole_and_nothing_else_is_written(entry, dtype, columns):
    rows_EN, buffer_SN = tagged_rows(6, columns, dtype, entry.device), poisoned(7, columns, dtype, entry.device)
    bank_SN = buffer_SN[1:-1]  # a slot of -1, or one too many, would show
    loads = Loads.empty(4, entry.device)
    want = bank_SN.cpu()
    for pairs in ([], [(3, 2)], [(5, 0), (0, 4)], [(1, 4), (2, 3), (3, 1), (4, 0)]):
        fill(loads, pairs)
        entry.kernels.gather(rows_EN, bank_SN, loads)
        for expert, slot in pairs:
            want[slot] = rows_EN[expert].cpu()
        assert torch.equal(bits(bank_SN), bits(want))
        assert buffer_SN[[0, -1]].isnan().all()


def test_decided_rows_are_in_their_slots(entry):
    draw = random.Random(1)
    rows_EN, bank_SN = (make(n, 12, torch.float32, entry.device) for make, n in ((tagged_rows, 6), (poisoned, 3)))
    both = entry.both(6, 3)
    for _ in range(40):
        ids = draw.sample(range(6), 2)
        slots_P, _ = both.event(ids)
        entry.kernels.gather(rows_EN, bank_SN, both.loads[2])
        assert torch.equal(bank_SN[slots_P].cpu(), rows_EN[ids].cpu())


@pytest.mark.parametrize("programs", [1, 3, 264])
def test_any_number_of_programs_copies_the_same(entry, programs):
    if entry.kernels.gather is reference.gather:
        pytest.skip("has no programs")
    rows_EN, bank_SN = (make(4, 9000, torch.float32, entry.device) for make in (tagged_rows, poisoned))
    loads = Loads.empty(4, entry.device)
    fill(loads, [(2, 0), (3, 3), (1, 1)])
    entry.kernels.gather(rows_EN, bank_SN, loads, programs=programs)
    assert torch.equal(bank_SN[[0, 3, 1]].cpu(), rows_EN[[2, 3, 1]].cpu()) and bank_SN[2].isnan().all()


def test_rows_that_cannot_be_copied_whole_are_refused(entry):
    if entry.kernels.gather is reference.gather:
        pytest.skip("copies any rows")
    loads = Loads.empty(1, entry.device)
    rows = torch.zeros(2, 8, device=entry.device)
    for source, target in ((rows[:, :3], rows[:, :3]), (rows[:, ::2], rows[:, ::2]), (rows, rows[:, :4])):
        with pytest.raises(ValueError, match="bytes"):
            entry.kernels.gather(source, target, loads)


def tagged_rows(experts, columns, dtype, device):
    """Rows no two elements of which, nor of two rows, can be taken for one another; pinned where a GPU reads them."""
    row_bytes = columns * dtype.itemsize
    words = torch.arange(experts * row_bytes // 4, dtype=torch.int32).view(experts, -1) + 2**20
    return words.pin_memory().view(dtype) if device == "cuda" else words.view(dtype)


def poisoned(slots, columns, dtype, device):
    return torch.full((slots, columns), torch.nan, dtype=dtype, device=device)


def bits(rows):
    return rows.cpu().view(torch.uint8)


def fill(loads, pairs):
    padding = [(-1, -1)] * (len(loads.slot_P) - len(pairs))
    experts, slots = zip(*pairs, *padding, strict=True)
    loads.expert_P.copy_(torch.tensor(experts))
    loads.slot_P.copy_(torch.tensor(slots))
    loads.count_1.fill_(len(pairs))


# indexed_mm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "field", "transposed", "interleaved"])
@pytest.mark.parametrize(("hidden", "rows"), [(1, 1), (7, 5), (300, 70), (256, 64)])
def test_indexed_mm(entry, dtype, layout, hidden, rows):
    generator = torch.Generator().manual_seed(0)
    slots_P = torch.tensor([4, 0, 2, 0])
    x_PH = torch.randn(4, hidden, generator=generator).to(dtype)
    values_SMH = torch.randn(5, rows, hidden, generator=generator).to(dtype)
    values_SMH[[1, 3]] = torch.nan  # slots that nothing asks for
    weight_SMH = laid_out(values_SMH.to(entry.device), layout)
    out_PM = entry.kernels.indexed_mm(x_PH.to(entry.device), weight_SMH, slots_P.to(entry.device)).cpu()

    terms_PMH = values_SMH[slots_P].double() * x_PH.double().unsqueeze(1)
    want_PM, size_PM = terms_PMH.sum(-1), terms_PMH.abs().sum(-1)
    assert out_PM.dtype == dtype and out_PM.shape == want_PM.shape
    bound_PM = torch.finfo(dtype).eps * want_PM.abs() + 20 * torch.finfo(torch.float32).eps * size_PM
    assert ((out_PM.double() - want_PM).abs() <= bound_PM).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "field", "transposed"])
@pytest.mark.parametrize(("hidden", "inner"), [(7, 5), (300, 70)])
def test_gated_mm(entry, dtype, layout, hidden, inner):
    """The bits of two launches: the products, rounded, and then silu of the gate times up, rounded once."""
    generator = torch.Generator().manual_seed(0)
    slots_P = torch.tensor([4, 0, 2, 0]).to(entry.device)
    x_PH = torch.randn(4, hidden, generator=generator).to(entry.device, dtype)
    weight_SMH = laid_out(torch.randn(5, 2 * inner, hidden, generator=generator).to(entry.device, dtype), layout)
    out_PI = entry.kernels.gated_mm(x_PH, weight_SMH, slots_P)
    gate_PI, up_PI = entry.kernels.indexed_mm(x_PH, weight_SMH, slots_P).double().chunk(2, dim=-1)
    want_PI = torch.nn.functional.silu(gate_PI) * up_PI
    assert out_PI.dtype == dtype and out_PI.shape == want_PI.shape
    roundings = 1.5 if entry.kernels.gated_mm is reference.gated_mm else 0.5  # torch's own rounds silu, too
    bound_PI = (roundings * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps) * want_PI.abs()
    assert ((out_PI.double() - want_PI).abs() <= bound_PI).all()


# grouped_mm


RUNS = {
    "one": [(2, 1)],
    "one slot": [(1, 70)],
    "a tile and one more": [(0, 65)],
    "any order": [(4, 3), (0, 130), (3, 64), (2, 1)],
    "back again": [(1, 40), (3, 2), (1, 40), (0, 1), (3, 70)],  # more runs than slots
    "every pair another": [(i % 4, 1) for i in range(90)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layout", "runs"),
    [*((layout, "any order") for layout in ("rows", "transposed", "interleaved")), *(("field", runs) for runs in RUNS)],
)
@pytest.mark.parametrize(("hidden", "columns"), [(1, 1), (70, 150)])
def test_grouped_mm(entry, dtype, layout, runs, hidden, columns):
    generator = torch.Generator().manual_seed(0)
    slots_P = torch.tensor([slot for slot, count in RUNS[runs] for _ in range(count)])
    wide_PH = torch.randn(len(slots_P), 2 * hidden, generator=generator).to(dtype)
    values_SOH = torch.randn(5, columns, hidden, generator=generator).to(dtype)
    values_SOH[[slot for slot in range(5) if slot not in slots_P]] = torch.nan
    weight_SHO = laid_out(values_SOH.to(entry.device), layout).transpose(1, 2)
    wide_P2 = torch.stack([slots_P, slots_P], dim=1).to(entry.device)
    x_PH = wide_PH[:, ::2] if layout == "field" else wide_PH[:, :hidden].contiguous()
    out_PO = entry.kernels.grouped_mm(x_PH.to(entry.device), weight_SHO, wide_P2[:, 0]).cpu()
    terms_POH = values_SOH[slots_P].double() * x_PH.double().unsqueeze(1)
    want_PO, size_PO = terms_POH.sum(-1), terms_POH.abs().sum(-1)
    assert out_PO.dtype == dtype and out_PO.shape == want_PO.shape
    bound_PO = torch.finfo(dtype).eps * want_PO.abs() + 20 * torch.finfo(torch.float32).eps * size_PO
    assert ((out_PO.double() - want_PO).abs() <= bound_PO).all()


def test_grouped_mm_of_nothing(entry):
    x_PH, weight_SHO, slots_P = (torch.zeros(size, device=entry.device) for size in ((0, 8), (2, 8, 16), 0))
    assert entry.kernels.grouped_mm(x_PH, weight_SHO, slots_P.long()).shape == (0, 16)


def test_what_does_not_fit_is_refused(entry):
    if entry.kernels.grouped_mm is reference.grouped_mm:
        pytest.skip("torch refuses it")
    x_PH, weight_SHO, slots_P = (torch.zeros(size, device=entry.device) for size in ((3, 8), (2, 8, 16), 3))
    slots_P = slots_P.long()
    for x, weight, slots in (
        (x_PH[:, :7], weight_SHO, slots_P), (x_PH, weight_SHO, slots_P[:2]), (x_PH.bfloat16(), weight_SHO, slots_P)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            entry.kernels.grouped_mm(x, weight, slots)


@pytest.mark.parametrize("runs", RUNS)
def test_tiles_end_with_their_run(runs):
    pytest.importorskip("triton")
    from moe_offload.runtime.kernels.grouped_triton import tile_table

    slots_P = torch.tensor([slot for slot, count in RUNS[runs] for _ in range(count)])
    tiles, begin_T = tile_table(slots_P, 16)
    begins = begin_T[: int(tiles) + 1].tolist()
    assert (begins[0], begins[-1]) == (0, len(slots_P))
    for begin, end in itertools.pairwise(begins):
        assert 0 < end - begin <= 16 and len(set(slots_P[begin:end].tolist())) == 1
    assert int(tiles) <= -(-len(slots_P) // 16) + len(RUNS[runs]) - (len(RUNS[runs]) > 0)


def laid_out(values_SMH, layout):
    """The same values, in a bank whose other elements are NaN."""
    slots, rows, hidden = values_SMH.shape
    if layout == "rows":
        return values_SMH
    bank_SN = poisoned(slots, 2 * rows * hidden + 24, values_SMH.dtype, values_SMH.device)
    if layout == "field":
        weight_SMH = bank_SN[:, 8 : 8 + rows * hidden].view(slots, rows, hidden)
    elif layout == "transposed":
        weight_SMH = bank_SN[:, 8 : 8 + rows * hidden].view(slots, hidden, rows).transpose(1, 2)
    else:  # as one half of gate and up, column by column
        weight_SMH = bank_SN[:, 8 : 8 + 2 * rows * hidden].view(slots, hidden, 2 * rows).transpose(1, 2)[:, 1::2]
    return weight_SMH.copy_(values_SMH)


# in a CUDA graph


class Replayed:
    """A decision and its loads as one graph: captured for the first event, replayed for every one."""

    def __init__(self, kernels, rows_EN, bank_SN):
        self.kernels, self.rows_EN, self.bank_SN, self.graph = kernels, rows_EN, bank_SN, None

    def decide(self, ids_P, state, loads, pace_2):
        if self.graph is None:
            self.ids_P = ids_P.clone()
            other = StateBlock([(len(state.slot_of_E), len(state.expert_at_S))], "cuda").states[0]
            self.step(other, Loads.empty(len(ids_P), "cuda"), pace_2)  # compiles
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.slots_P = self.step(state, loads, pace_2)
        self.ids_P.copy_(ids_P)
        self.graph.replay()
        return self.slots_P

    def step(self, state, loads, pace_2):
        slots_P = self.kernels.decide(self.ids_P, state, loads, pace_2)
        self.kernels.gather(self.rows_EN, self.bank_SN, loads)
        return slots_P


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device, and no TRITON_INTERPRET")
def test_one_captured_event_serves_every_other():
    rows_EN, bank_SN = (make(n, 9000, torch.float32, "cuda") for make, n in ((tagged_rows, 16), (poisoned, 5)))
    replayed = Replayed(KERNELS["cuda"](), rows_EN, bank_SN)
    both, draw = Both(16, 5, kernels=replayed, device="cuda"), random.Random(4)
    for _ in range(200):
        ids = draw.sample(range(16), 3)
        slots_P, _ = both.event(ids)
        assert torch.equal(bank_SN[slots_P].cpu(), rows_EN[ids])
    both.check()


# the table


def test_triton_is_imported_only_for_cuda():
    program = "import sys, moe_offload.runtime.kernels as k; k.KERNELS['cpu'](); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(OffloadError, match="pip install triton"):
        KERNELS["cuda"]()
