"""Experts' products of few tokens in compute="exact": ours where torch's order of sums is known, to the bit."""

import pytest
import torch

import moe_offload
from moe_offload.apps.families.tiny import build
from moe_offload.forward.graphs import products
from moe_offload.packed import exact, exact_linear, in_lanes
from moe_offload.packed.compiled.in_order import dense
from moe_offload.patch import exact_products
from moe_offload.runtime.kernels import exact_rows

needs_kernel = pytest.mark.skipif(exact.multiplier() is None, reason="no kernel for this processor")


@pytest.fixture
def small_is_large(monkeypatch):
    for module in (exact_products, exact_rows):
        monkeypatch.setattr(module, "LARGE", 1)


@needs_kernel
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_has_the_bits_of_the_resident_model(batch, small_is_large, monkeypatch):
    calls, multiply_each = [], dense.multiply_each

    def counted(products, shape, *args):
        calls.append(shape)
        multiply_each(products, shape, *args)

    monkeypatch.setattr(dense, "multiply_each", counted)
    model = build("qwen3_moe", dtype=torch.bfloat16, hidden_size=64, moe_intermediate_size=32)
    prompt = torch.randint(3, 90, (batch, 5), generator=torch.Generator().manual_seed(0))
    wanted = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(prompt, **wanted)
    model = moe_offload.optimize(model, "20MB", config={"experts_implementation": "grouped_mm"})
    ours = model.generate(prompt, **wanted)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))
    orders = [exact.find_order(rows, 64, 64, torch.bfloat16, turned=False) for rows in (1, 2, 3)]
    if any(orders):
        assert calls


def test_small_matrices_are_left_to_torch_and_numba_is_not_asked_for(monkeypatch):
    def never(multiply):
        raise AssertionError

    monkeypatch.setattr(exact_products, "serve_few_rows", never)
    moe_offload.optimize(build("qwen3_moe", dtype=torch.bfloat16), "20MB").moe_offload.close()


@needs_kernel
def test_linear_layers_give_way_to_what_the_user_puts_there(small_is_large, monkeypatch):
    model = build("qwen3_moe", dtype=torch.bfloat16, hidden_size=128, moe_intermediate_size=32)
    model = moe_offload.optimize(model, "20MB")
    linear = model.model.layers[0].self_attn.q_proj
    if "forward" not in vars(linear):
        pytest.skip("torch adds up in none of the known orders here")
    x = torch.randn(1, 1, 128).bfloat16()
    calls, multiply = [], exact.multiplier()
    monkeypatch.setattr(exact_products, "multiplier", lambda: lambda *args: calls.append(1) or multiply(*args))
    plain = torch.nn.functional.linear(x, linear.weight)
    with torch.no_grad():
        assert torch.equal(linear(x), plain) and len(calls) == 1
        with torch.autocast("cpu", torch.float16):
            assert linear(x).dtype == torch.float16
    assert linear(x).requires_grad == linear.weight.requires_grad  # gradients are asked for: torch's
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: "the user's")
    assert linear(x) == "the user's"
    monkeypatch.undo()
    assert len(calls) == 1
    model.moe_offload.close()
    assert "forward" not in vars(linear)


@needs_kernel
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (1, 1, 96), (3, 96), (3, 1, 96)])
def test_a_linear_layer_has_torchs_bits(shape, biased, small_is_large):
    linear = torch.nn.Linear(96, 200, bias=biased, dtype=torch.bfloat16)
    x, cancels = torch.randn(shape).bfloat16(), torch.randn(200, 48).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(torch.cat([cancels, -cancels], 1))
        x[..., 48:] = x[..., :48]
        expected = linear(x)
        exact_products.sharpen_linears(linear)
        assert torch.equal(linear(x), expected)


@needs_kernel
def test_another_order_in_linear_layers_is_not_taken_for_a_known_one(monkeypatch):
    def halves_first(x, weight, bias=None):
        return (
            x[..., :48].float() @ weight[:, :48].t().float() + x[..., 48:].float() @ weight[:, 48:].t().float()
        ).bfloat16()

    monkeypatch.setattr(exact_linear.functional, "linear", halves_first)
    monkeypatch.setattr(exact_linear, "_found", {})
    weight = torch.randn(4096, 96).bfloat16()
    assert exact_linear.find_linear_order(weight, 1, False, 3) is None
    monkeypatch.setattr(exact_linear, "MADE_UP", 1)  # as with an output head, which is tried itself
    assert exact_linear.find_linear_order(weight, 1, False, 2) is None
    assert exact_linear.find_linear_order(weight, 2, False, 2) is None


@needs_kernel
@pytest.mark.parametrize("order", exact.ORDERS)
def test_an_output_head_shows_its_order_where_orders_hardly_differ(order, monkeypatch):
    """With 544 inputs, two of them differ in one addition: in none of 40,000 products with random numbers."""

    def linear(x, weight, bias=None):
        out = torch.empty((x.numel() // weight.shape[1], len(weight)), dtype=torch.bfloat16)
        dense.multiply(x.reshape(-1, weight.shape[1]), weight, out, *order, bias)
        return out

    monkeypatch.setattr(exact_linear.functional, "linear", linear)
    monkeypatch.setattr(exact_linear, "_found", {})
    monkeypatch.setattr(exact_linear, "MADE_UP", 1)
    weight = (torch.randn(4096, 544, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    assert exact_linear.find_linear_order(weight, 1, False, 3) == order
    assert exact_linear.find_linear_order(weight, 1, True, 3) == order
    assert exact_linear.find_linear_order(torch.zeros(4096, 576).bfloat16(), 1, False, 3) is None, "zeros show nothing"
    assert exact_linear.find_linear_order(torch.full((4096, 608), float("nan")).bfloat16(), 1, False, 3) is None


@needs_kernel
def test_inputs_of_other_shapes_and_strides_than_were_tried_are_torchs(small_is_large, monkeypatch):
    linear = torch.nn.Linear(96, 200, dtype=torch.bfloat16)
    if not exact_products.sharpen_linears(linear):
        pytest.skip("torch adds up in none of the known orders here")
    monkeypatch.setattr(exact_products, "multiplier", lambda: pytest.fail("our kernel"))
    prompt = torch.randn(1, 7, 96).bfloat16()
    with torch.no_grad():
        for x in (prompt[:, -1:], prompt[:, :1, None], prompt[0, 0]):
            assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


OTHER_PARTS = {
    "a bias of one element": ("bias", lambda part: part[:1]),
    "a bias for each row": ("bias", lambda part: part.repeat(2, 1)),
    "a negative view as bias": ("bias", torch._neg_view),
    "a negative view as weight": ("weight", torch._neg_view),
}


@pytest.mark.parametrize("other", OTHER_PARTS)
def test_parts_that_are_not_what_a_kernel_reads_are_torchs(other, small_is_large):
    """A kernel reads as many elements as there are outputs, as they lie in memory."""
    linear, x = torch.nn.Linear(128, 200, dtype=torch.bfloat16), torch.randn(2, 128).bfloat16()
    if not exact_products.sharpen_linears(linear):
        pytest.skip("torch adds up in none of the known orders here")
    name, change = OTHER_PARTS[other]
    with torch.no_grad():
        linear(x)
        setattr(linear, name, torch.nn.Parameter(change(getattr(linear, name).detach())))
        for input in (x, torch._neg_view(x)):
            assert torch.equal(linear(input), torch.nn.functional.linear(input, linear.weight, linear.bias))


@pytest.mark.parametrize("turned", [False, True])
def test_negative_views_in_graphs_are_torchs(turned, small_is_large):
    """Activations with the order of one row are read where they lie."""
    x, stack = torch.randn(1, 128).bfloat16(), torch.randn(2, 128, 128).bfloat16()
    stack = stack if turned else stack.transpose(1, 2)
    for one, weight in ((torch._neg_view(x), stack), (x, torch._neg_view(stack))):
        assert exact_rows.multiply(one, weight, [(1, 0, 1)], torch.empty(1, 128).bfloat16()) == [(1, 0, 1)]


def test_a_program_with_another_default_device(small_is_large):
    """What is tried out, and what kernels read, is on the CPU all the same."""
    x, stack = torch.randn(9, 128).bfloat16(), torch.randn(2, 128, 128).bfloat16()
    shape, out = (128, 320), [torch.empty(9, 128, dtype=torch.bfloat16) for _ in range(4)]
    with torch.device("meta"):
        exact_rows.try_products([shape], [shape])
        found = [exact.find_order(1, *shape, torch.bfloat16, turned=False), in_lanes.is_in_lanes(*shape)]
        exact.transposed_is_exact(1, *shape, torch.bfloat16)
        exact.strips_are_exact((64, 64), 320, torch.bfloat16)
        exact_linear.find_linear_order(stack[0], 1, False, 3)
        in_lanes.linear_is_in_lanes(stack[0], True, 3)
        for weight, few, many in ((stack, *out[:2]), (stack.transpose(1, 2), *out[2:])):
            in_lanes.multiply_exactly(x[:2], weight[0], few[:2])
            in_lanes.multiply_exactly(x, weight[1], many)
    for cached in (exact._find_orders, exact._transposed_is_exact, exact._strips_are_exact):
        cached.cache_clear()
    in_lanes._known.clear()
    assert found == [exact.find_order(1, *shape, torch.bfloat16, turned=False), in_lanes.is_in_lanes(*shape)]
    for weight, few, many in ((stack, *out[:2]), (stack.transpose(1, 2), *out[2:])):
        assert torch.equal(few[:2], torch.mm(x[:2], weight[0])) and torch.equal(many, torch.mm(x, weight[1]))


@needs_kernel
def test_what_is_no_plain_product_of_few_rows_is_torchs():
    x, stack = torch.randn(1, 1024).bfloat16(), torch.randn(2, 1024, 1024).bfloat16()
    out, runs, turned = torch.empty(1, 1024, dtype=torch.bfloat16), [(1, 0, 1)], stack.transpose(1, 2)
    assert exact_rows.multiply(x, stack, runs, out) == runs  # columns of outputs lie together
    assert exact_rows.multiply(x.repeat(9, 1), turned, [(1, 0, 9)], out.repeat(9, 1)) == [(1, 0, 9)]
    assert exact_rows.multiply(x.float(), turned.float(), runs, out.float()) == runs
    assert exact_rows.multiply(x[:, :64], turned[:, :64, :64], runs, out[:, :64]) == runs
    assert exact_rows.multiply(x.repeat(1, 2)[:, ::2], turned, runs, out) == runs  # elements of a row lie apart
    assert exact_rows.multiply(x, turned, runs, out.repeat(1, 2)[:, ::2]) == runs


@needs_kernel
def test_runs_of_all_lengths_have_torchs_bits_each(small_is_large):
    """Some are computed together, by how many pairs they have; some are left to torch."""
    g = torch.Generator().manual_seed(0)
    stack, x = (torch.randn(shape, generator=g).bfloat16() for shape in ((5, 80, 1536), (20, 1536)))
    runs = [(4, 0, 1), (0, 1, 3), (2, 3, 4), (3, 4, 13), (1, 13, 16), (0, 16, 18), (2, 18, 20)]
    out = torch.full((20, 80), 7.0, dtype=torch.bfloat16)
    left = exact_rows.multiply(x, stack.transpose(1, 2), runs, out)
    assert (3, 4, 13) in left
    for slot, begin, end in runs:
        if (slot, begin, end) in left:
            assert (out[begin:end] == 7).all()
        else:
            assert torch.equal(out[begin:end], torch.mm(x[begin:end], stack[slot].t()))


def test_graphs_leave_to_torch_what_the_kernel_does_not_take():
    products.serve_few_rows(lambda x, weight, runs, out: runs)
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(4, 48, 32).bfloat16().transpose(1, 2)
    slots = torch.tensor([2, 2, 0])
    expected = torch.cat([x[:2] @ weight[2], x[2:] @ weight[0]])
    assert torch.equal(torch.ops.moe_offload.grouped_mm(x, weight, slots), expected)
