"""Layers whose experts are all handed all tokens, zeros where they got none: exact, and only those in use are read."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import moe_offload
from moe_offload.apps.families.session import run_session
from moe_offload.apps.families.tiny import build as build_family
from moe_offload.errors import OffloadError, UnsupportedModelError
from moe_offload.experts import find_experts
from tests.fakes.stack_models import build, offload, prompt, same, session


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_outputs_are_the_plain_models(dtype, top_k):
    for batch, length in ((1, 16), (3, 33)):
        ids = prompt(batch, length)
        want = session(build("masked", dtype, num_experts_per_tok=top_k), ids)
        for residency in (0.0, 0.5, 1.0):
            model = offload(build("masked", dtype, num_experts_per_tok=top_k), residency)
            assert same(want, session(model, ids)), (batch, residency)
            model.moe_offload.close()


def test_two_graphs_serve_all_lengths():
    torch._dynamo.reset()
    counters.clear()
    model = offload(build("masked"))
    for length in (16, 5, 33, 7):
        model(prompt(1, length))
    session(model, prompt())
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


def test_one_token_reads_its_experts_and_no_other():
    model = build("masked", num_hidden_layers=1)
    weights = sum(field.nbytes for field in find_experts(model)[0].layout.fields)
    offload(model, 1.0)(prompt(1, 1))
    stats = model.moe_offload.stats()
    assert (stats.misses, stats.bytes_read, stats.tokens) == (2, 2 * weights, 1)


def test_counts_are_those_of_the_routing():
    model = offload(build("masked"), 0.5)
    session(model, prompt())
    stats = model.moe_offload.stats()
    assert (stats.events, stats.tokens) == (2 * 7, 22)
    assert [sum(counts) for counts in model.moe_offload.profile().counts] == [44, 44]


def test_a_profile_is_recorded_without_offloading():
    model = build("masked")
    got = moe_offload.record_profile(model, prompt())
    session(model, prompt(), 0)
    want = offload(build("masked"))
    want(prompt())
    assert got.counts == want.moe_offload.profile().counts


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused_before_the_model_is_changed(value):
    """Plain transformers multiplies them with the zeros of all tokens."""
    model = build("masked")
    model.model.layers[1].mlp.experts.down_proj.data[5, 3, 2] = value
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts: down_proj of expert 5"):
        offload(model)
    assert not hasattr(model, "moe_offload")
    assert model(prompt()).logits.isnan().any()


def test_rows_of_files_that_are_not_finite_are_refused_as_they_are_read(tmp_path):
    plain = build_family("llama4")
    plain.model.layers[1].feed_forward.experts.gate_up_proj.data[:, 3, 2] = float("inf")
    plain.save_pretrained(tmp_path)
    model = moe_offload.from_pretrained(tmp_path, "1GB")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.feed_forward\.experts: gate_up_proj of expert"):
        model(prompt())


def test_a_family_of_transformers_from_its_files(tmp_path):
    plain = build_family("llama4")
    plain.save_pretrained(tmp_path)
    model = moe_offload.from_pretrained(tmp_path, "1GB", config={"poison": True})
    options = {"batch": 2, "new_tokens": 4}
    assert same(run_session(plain, "lm", **options), run_session(model, "lm", **options))
    want, got = plain.state_dict(), model.state_dict()
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_a_compile_of_the_users_own_gives_the_same():
    plain, model = build_family("llama4"), build_family("llama4")
    offload(model, 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for length in (9, 1):
        ids = prompt(1, length) + 3
        assert torch.equal(plain(ids).logits, compiled(ids).logits)


def test_code_of_somebody_elses_is_one_op_only_where_it_is_known():
    model = offload(build("masked"), 0.5)
    with pytest.raises(UnsupportedModelError, match="MaskedExperts multiplies all experts at once, and was not traced"):
        torch.compile(model, backend="eager")(prompt())


def test_experts_that_make_something_of_nothing_are_refused_by_name():
    model = build("masked")
    experts = model.model.layers[0].mlp.experts
    experts.combine = lambda y: y.chunk(2, -1)[0].exp()
    offload(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts: .* is not zero where an expert"):
        model(prompt())


@pytest.mark.parametrize("given", [3, torch.tensor(3)])
def test_what_is_no_hidden_states_is_refused_by_name(given):
    experts = offload(build("masked")).model.layers[1].mlp.experts
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts: .* is called with"):
        experts(given)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, -0.0])
@pytest.mark.parametrize("rows", [slice(4, 5), slice(None)], ids=["one token", "all tokens"])
def test_hidden_states_that_are_not_finite_give_what_the_plain_model_gives(value, rows):
    """Infinity times zero, which is how a token is kept from an expert, is NaN for every expert: all are used."""
    plain, model = (one.model.layers[1].mlp for one in (build("masked"), offload(build("masked"), 0.5)))
    x = torch.randn(1, 9, 32)
    x[:, rows, 3] = value
    want, got = plain(x), model(x)
    assert torch.equal(want.isnan(), got.isnan()) and bool(got.isnan().any()) == (abs(value) != 0)
    assert torch.equal(want.nan_to_num(7), got.nan_to_num(7))
    assert torch.equal(want.signbit() & ~want.isnan(), got.signbit() & ~got.isnan())


def test_gradients_are_refused():
    model = offload(build("masked"))
    x = torch.randn(1, 4, 32, requires_grad=True)
    with pytest.raises(OffloadError, match="inference only"):
        model.model.layers[0].mlp(x).sum().backward()


def test_a_closed_model_says_so():
    model = offload(build("masked"))
    model.moe_offload.close()
    with pytest.raises(moe_offload.ClosedError):
        model.model.layers[0].mlp(torch.randn(1, 4, 32))
