"""Products in 64 lanes: the order of sums that torch's own loops have, and torch's bits where they are what it runs."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import moe_offload
from moe_offload.apps.families.tiny import build
from moe_offload.packed import exact, in_lanes
from moe_offload.patch import exact_products
from moe_offload.runtime.kernels import exact_rows
from tests.fakes import loop_models

dense = pytest.importorskip("moe_offload.packed.compiled.in_lanes.dense")
turned = pytest.importorskip("moe_offload.packed.compiled.in_lanes.turned")
pytestmark = pytest.mark.skipif(not dense.can_run(), reason="no AVX2 here")
needs_loops = pytest.mark.skipif(in_lanes.load_kernels() is None, reason="torch asks oneDNN here")


def by_hand(x_MI, weight_OI, bias_O=None):
    """Lane by lane, then folded: each sum is rounded to float32, and no product."""
    x, w = x_MI.double().numpy(), weight_OI.double().numpy()
    sums = np.zeros((len(x), len(w), 64), np.float32)
    for first in range(0, x.shape[1], 64):
        sums = (sums + x[:, None, first : first + 64] * w[None, :, first : first + 64]).astype(np.float32)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    total = torch.from_numpy(sums[..., 0])
    return (total if bias_O is None else total + bias_O.float()).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(12, 64), (13, 128), (50, 2112), (100, 192)])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 49, 100])
def test_it_is_that_order(rows, outputs, inputs, biased):
    for x, weight in exact.trials(rows, outputs, inputs, torch.bfloat16):
        bias, out = torch.randn(outputs).bfloat16() if biased else None, torch.empty(rows, outputs).bfloat16()
        dense.multiply(x, weight, out, bias)
        assert torch.equal(out, by_hand(x, weight, bias))


TORCHS_ORDER = """
import torch
from moe_offload.packed import in_lanes
torch.set_num_threads({threads})
for outputs, inputs in ((128, 64), (1536, 2048), (50, 14336)):
    assert in_lanes.is_in_lanes(outputs, inputs)
    for rows in (1, 3, 17, 130):
        x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
        out = torch.empty(rows, outputs).bfloat16()
        in_lanes.multiply(x, weight, out)
        assert torch.equal(out, torch.mm(x, weight.t()))
"""


@needs_loops
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_torchs_order(threads):
    """In a process of its own: where other tests have left one of torch's threads flushing denormal numbers, torch's
    own results depend on which thread computes what, and no order is known."""
    subprocess.run([sys.executable, "-c", TORCHS_ORDER.format(threads=threads)], check=True)


AMID_FLUSHING = """
import torch
from moe_offload.packed import in_lanes
torch.set_num_threads(2)
x, weight = (torch.randn(5, 256) * 2.0**-64).bfloat16(), (torch.randn(96, 256) * 2.0**-64).bfloat16()
for flush in (False, True, False):
    torch.set_flush_denormal(flush)
    for some in (1, 2, 5):
        for w in (weight.t(), weight.t().contiguous()):
            out = torch.empty(some, 96).bfloat16()
            in_lanes.multiply_exactly(x[:some], w, out)
            assert torch.equal(out, torch.mm(x[:some], w)), (flush, some)
    assert in_lanes.is_in_lanes(96, 256) != flush
"""


@needs_loops
def test_a_program_that_begins_to_flush_denormal_numbers():
    """It does so in one thread, and the others of torch's go on as before: an order that was known is no longer."""
    subprocess.run([sys.executable, "-c", AMID_FLUSHING], check=True)


def test_runs_of_all_lengths_and_in_pieces(monkeypatch):
    monkeypatch.setattr(dense, "PANEL_BYTES", 1)  # one block of rows at a time
    stack, x = torch.randn(5, 40, 192).bfloat16(), torch.randn(170, 192).bfloat16()
    runs = [(4, 0, 1), (0, 1, 3), (2, 3, 4), (3, 4, 113), (1, 113, 116), (0, 116, 165), (2, 165, 170)]
    out = torch.full((170, 50), 7.0, dtype=torch.bfloat16)
    dense.multiply_runs(x, stack, runs, out[:, :40])
    for slot, begin, end in runs:
        assert torch.equal(out[begin:end, :40], by_hand(x[begin:end], stack[slot]))
    assert (out[:, 40:] == 7).all()


def test_what_is_no_number_stays_so():
    x, weight = torch.randn(9, 64).bfloat16(), torch.randn(12, 64).bfloat16()
    x[1, 3], x[2, 5], weight[4, 6] = float("inf"), float("nan"), -float("inf")
    few, many, expected = torch.empty(3, 12).bfloat16(), torch.empty(9, 12).bfloat16(), by_hand(x, weight)
    dense.multiply(x, weight, many)
    dense.multiply(x[:3], weight, few)
    assert torch.equal(many.isnan(), expected.isnan()) and torch.equal(few.isnan(), expected[:3].isnan())
    assert torch.equal(many.nan_to_num(), expected.nan_to_num())


@needs_loops
def test_another_order_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(in_lanes, "_known", {})
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w: (x.float() @ w.float()).bfloat16())
    assert not in_lanes.is_in_lanes(64, 128)
    monkeypatch.setattr(in_lanes, "_known", {})
    monkeypatch.setattr(torch, "mm", lambda x, w: mm(x, w) if len(x) <= 2 else (x.float() @ w.float()).bfloat16())
    assert not in_lanes.is_in_lanes(64, 128), "the order of decode steps was taken for that of prompts"


@needs_loops
def test_zeros_of_another_sign_are_not_taken_for_the_same(monkeypatch):
    monkeypatch.setattr(in_lanes, "_known", {})
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w: mm(x, w).add_(0.0))
    assert not in_lanes.is_in_lanes(64, 128)


@needs_loops
def test_where_onednn_is_asked_the_order_is_not_known(monkeypatch):
    in_lanes.load_kernels.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    try:
        assert in_lanes.load_kernels() is None and not in_lanes.is_in_lanes(64, 192)
    finally:
        in_lanes.load_kernels.cache_clear()


@needs_loops
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (1, 1, 128), (3, 5, 128), (70, 128), (0, 128)])
def test_a_linear_layer_of_any_number_of_rows(shape, biased, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # with more, one row is left to torch
    monkeypatch.setattr(exact_products, "LARGE", 1)
    linear = torch.nn.Linear(128, 200, bias=biased, dtype=torch.bfloat16)
    x, calls, multiply = torch.randn(shape).bfloat16(), [], in_lanes.multiply
    with torch.no_grad():
        expected = linear(x)
        assert exact_products.sharpen_linears(linear)
        linear(x)  # it is tried out
        monkeypatch.setattr(in_lanes, "multiply", lambda *args: calls.append(1) or multiply(*args))
        assert torch.equal(linear(x), expected)
        assert len(calls) == (1 if x.numel() else 0)


@needs_loops
def test_the_last_token_of_a_prompt(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # with more, one row is left to torch
    monkeypatch.setattr(exact_products, "LARGE", 1)
    linear = torch.nn.Linear(128, 200, dtype=torch.bfloat16)
    prompt, calls, multiply = torch.randn(1, 7, 128).bfloat16(), [], in_lanes.multiply
    with torch.no_grad():
        expected = linear(prompt[:, -1:])
        exact_products.sharpen_linears(linear)
        linear(prompt[:, -1:])  # it is tried out
        monkeypatch.setattr(in_lanes, "multiply", lambda *args: calls.append(1) or multiply(*args))
        assert torch.equal(linear(prompt[:, -1:]), expected) and calls == [1]


@needs_loops
def test_an_output_head_is_tried_itself(monkeypatch):
    monkeypatch.setattr(in_lanes, "LARGE", 1)
    monkeypatch.setattr(in_lanes, "_known", {})
    weight = torch.randn(5000, 128).bfloat16()
    assert in_lanes.linear_is_in_lanes(weight, False, 3)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(in_lanes, "_known", {})

    def other(x, w, b=None):
        return linear(x, w, b) if len(w) <= 4096 else (x.float() @ w.t().float()).bfloat16()

    monkeypatch.setattr(in_lanes.functional, "linear", other)
    assert not in_lanes.linear_is_in_lanes(weight, False, 3)


@needs_loops
@pytest.mark.parametrize("budget", ["1600KB", "20MB"])
def test_a_model_generates_the_same(budget, monkeypatch):
    for module in (exact_products, exact_rows):
        monkeypatch.setattr(module, "LARGE", 1)
    calls, multiply_runs = [], dense.multiply_runs
    monkeypatch.setattr(dense, "multiply_runs", lambda *args: calls.append(args[2]) or multiply_runs(*args))
    model = build("qwen3_moe", dtype=torch.bfloat16, hidden_size=128, moe_intermediate_size=64)
    prompt = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(prompt, **wanted)
    model = moe_offload.optimize(model, budget, config={"reserve": 0})
    ours = model.generate(prompt, **wanted)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))
    assert any(end - begin > 4 for runs in calls for _, begin, end in runs)


def in_parts_by_hand(x_MI, weight_IO):
    x, w = x_MI.double().numpy(), weight_IO.double().numpy()
    sums = np.zeros((4, len(x), w.shape[1]), np.float32)
    for k in range(len(w)):
        sums[k % 4] = (sums[k % 4] + x[:, k, None] * w[k]).astype(np.float32)
    return torch.from_numpy(((sums[0] + sums[1]) + sums[2]) + sums[3]).bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 64), (100, 192), (300, 128), (50, 2112)])
@pytest.mark.parametrize("rows", [1, 3, 5, 49, 100])
def test_outputs_side_by_side_are_added_up_in_four_parts(rows, outputs, inputs):
    for x, weight in exact.trials(rows, outputs, inputs, torch.bfloat16):
        turned_weight, out = weight.t().contiguous(), torch.empty(rows, outputs).bfloat16()
        turned.multiply_runs(x, turned_weight[None], [(0, 0, rows)], out)
        assert torch.equal(out, in_parts_by_hand(x, turned_weight))
        if in_lanes.load_kernels() is not None:
            assert in_lanes.is_in_parts(outputs, inputs) and torch.equal(out, torch.mm(x, turned_weight))


def test_turned_runs_of_all_lengths_and_in_pieces(monkeypatch):
    monkeypatch.setattr(turned, "PANEL_BYTES", 1)
    stack, x = torch.randn(5, 192, 40).bfloat16(), torch.randn(170, 192).bfloat16()
    runs = [(4, 0, 1), (0, 1, 3), (2, 3, 4), (3, 4, 113), (1, 113, 116), (0, 116, 165), (2, 165, 170)]
    out = torch.full((170, 50), 7.0, dtype=torch.bfloat16)
    turned.multiply_runs(x, stack, runs, out[:, :40])
    for slot, begin, end in runs:
        assert torch.equal(out[begin:end, :40], in_parts_by_hand(x[begin:end], stack[slot]))
    assert (out[:, 40:] == 7).all()


@needs_loops
def test_products_of_a_graph_take_both(monkeypatch):
    monkeypatch.setattr(exact_rows, "LARGE", 1)
    x, stack = torch.randn(9, 64).bfloat16(), torch.randn(2, 64, 64).bfloat16()
    for weight in (stack, stack.transpose(1, 2)):
        out = torch.empty(9, 64).bfloat16()
        assert exact_rows.multiply(x, weight, [(1, 0, 6), (0, 6, 9)], out) == []
        assert torch.equal(out, torch.cat([x[:6] @ weight[1], x[6:] @ weight[0]]))


@needs_loops
def test_a_product_in_place_of_torchs():
    x, weight = torch.randn(9, 128).bfloat16(), torch.randn(128, 48).bfloat16()
    for w in (weight, weight.t().contiguous().t(), weight[:, ::2]):
        out = torch.empty(9, w.shape[1]).bfloat16()
        in_lanes.multiply_exactly(x, w, out)
        assert torch.equal(out, torch.mm(x, w))


@needs_loops
@pytest.mark.parametrize("large", [1 << 24, 1])
def test_linear_layers_of_experts_that_are_called(large, monkeypatch):
    """Their weights are phantoms, and in a call views of a slot; beyond `large` the weight itself is tried then."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # with more, one row is left to torch
    monkeypatch.setattr(exact_products, "LARGE", 1)
    monkeypatch.setattr(in_lanes, "LARGE", large)
    calls, multiply = [], in_lanes.multiply
    monkeypatch.setattr(in_lanes, "multiply", lambda *args: calls.append(len(args[0])) or multiply(*args))
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    ids = loop_models.prompt(1, 33)
    want = loop_models.session(loop_models.build("hits", torch.bfloat16, **sizes), ids)
    model = loop_models.offload(loop_models.build("hits", torch.bfloat16, **sizes), 0.5)
    expert = next(m for m in model.modules() if isinstance(m, torch.nn.Linear) and "forward" in vars(m))
    calls.clear()
    assert loop_models.same(want, loop_models.session(model, ids))
    assert len(calls) > 100
    model.moe_offload.close()
    assert "forward" not in vars(expert)
