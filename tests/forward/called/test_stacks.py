"""Stacks and lists that a model's code reads by a number: each of its ways, exact, and reading what it needs."""

from __future__ import annotations

import threading

import pytest
import torch

import moe_offload
from moe_offload.apps.families.session import run_session
from moe_offload.apps.families.tiny import build as build_family
from moe_offload.errors import UnsupportedModelError
from moe_offload.experts import find_experts
from tests.fakes.stack_models import STACK_LOOPS, build, offload, prompt, same, session


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loop", STACK_LOOPS)
def test_outputs_are_the_plain_models(loop, dtype):
    for batch, length in ((1, 16), (3, 33)):
        ids = prompt(batch, length)
        want = session(build(loop, dtype), ids)
        for residency in (0.0, 0.5, 1.0):
            model = offload(build(loop, dtype), residency)
            assert same(want, session(model, ids)), (batch, residency)
            model.moe_offload.close()


@pytest.mark.parametrize("loop", ["stacked", "parallel", "lists"])
def test_a_slot_is_enough(loop):
    model = offload(build(loop))
    assert set(model.moe_offload.plan.slots) == {1}
    assert same(session(build(loop), prompt()), session(model, prompt()))


@pytest.mark.parametrize("loop", ["stacked", "joined", "parallel", "lists", "grouped"])
def test_one_token_reads_its_two_experts(loop):
    """Whether the others are not visited, or visited with no rows."""
    model = build(loop, num_hidden_layers=1)
    weights = [sum(field.nbytes for field in moe.layout.fields) for moe in find_experts(model)]
    offload(model, 1.0)(prompt(1, 1))
    read = [(layer.misses, layer.bytes_read) for layer in model.moe_offload.stats().layers]
    assert read == [(2, 2 * nbytes) for nbytes in weights]


def test_all_weights_of_an_expert_are_one_use():
    """16 tokens and 6 steps of top-2, two layers."""
    for loop in ("stacked", "joined", "lists"):
        model = offload(build(loop), 0.5)
        session(model, prompt())
        stats = model.moe_offload.stats()
        assert (stats.events, stats.tokens) == (2 * 7, 22)
        assert [sum(counts) for counts in model.moe_offload.profile().counts] == [44, 44]


def test_weights_that_are_gone_through_twice_are_one_event():
    """All experts' first products, then all experts' second ones: with one slot each row is read twice."""
    model = offload(build("grouped", num_hidden_layers=1))
    model(prompt())
    stats = model.moe_offload.stats()
    used = sum(count > 0 for count in model.moe_offload.profile().counts[0])
    assert (stats.events, stats.tokens) == (1, 16) and used < stats.misses <= 2 * used


def test_experts_without_weights_are_never_read():
    model = offload(build("stack_identities"), 1.0)
    session(model, prompt(3, 33))
    assert all(counts[6:] == [0, 0] and sum(counts) for counts in model.moe_offload.profile().counts)
    for block in model.model.layers:  # the router names them, too
        arrivals = block.mlp.experts._moe_offload.calls.arrivals
        assert arrivals.cache.slot_of[6:] == [-1, -1] and not {6, 7} & set(arrivals.guessed)


@pytest.mark.parametrize("loop", ["joined", "parallel", "lists", "stack_identities"])
def test_a_profile_is_recorded_without_offloading(loop):
    plain, model = build(loop), offload(build(loop))
    before = {name: id(param) for name, param in plain.named_parameters()}
    recorded = moe_offload.record_profile(plain, [prompt(), prompt(2, 5)])
    for ids in (prompt(), prompt(2, 5)):
        model(ids)
    want = model.moe_offload.profile()
    assert (recorded.counts, recorded.tokens) == (want.counts, want.tokens)
    assert {name: id(param) for name, param in plain.named_parameters()} == before


@pytest.mark.parametrize("loop", ["biased", "joined", "stack_identities", "lists"])
def test_the_state_dict_has_the_real_weights(loop):
    plain, model = build(loop), offload(build(loop))
    want, got = plain.state_dict(), model.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    assert all(type(got[key]) is torch.Tensor for key in got)


@pytest.mark.parametrize("read", ["bmm", "sum", "mask"])
def test_code_that_reads_a_stack_otherwise_is_refused_by_name(read):
    model = offload(build("stacked"))
    experts = model.model.layers[1].mlp.experts
    experts.one = {
        "bmm": lambda e, x: torch.bmm(x.expand(8, -1, -1), experts.gate_up_proj.mT)[0],
        "sum": lambda e, x: x * experts.gate_up_proj.sum(),
        "mask": lambda e, x: x @ experts.gate_up_proj[torch.arange(8) == e][0].T,
    }[read]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts: .* was asked of gate_up_proj"):
        model(prompt())


def test_weights_outside_of_a_call_are_the_experts_own():
    plain, model = build("stacked"), offload(build("stacked"))
    for e in (3, 1):
        got, want = (m.model.layers[0].mlp.experts.down_proj[e] for m in (model, plain))
        assert torch.equal(got * 1, want)
    with pytest.raises(UnsupportedModelError, match="numpy was asked of the down_proj of expert 3"):
        model.model.layers[0].mlp.experts.down_proj[3].numpy()


def test_threads_take_turns():
    model = offload(build("parallel"), 0.25)
    prompts = [prompt(1, 16, seed) for seed in range(4)]
    want = [session(build("parallel"), ids, 3) for ids in prompts]
    got: dict[int, list] = {}

    def run(i):
        got[i] = session(model, prompts[i], 3)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(want[i], got[i]) for i in range(4))


def test_two_models_are_two():
    one, two = offload(build("stacked")), offload(build("stacked", seed=1))
    for ids in (prompt(), prompt(seed=2)):
        assert same(session(build("stacked"), ids), session(one, ids))
        assert same(session(build("stacked", seed=1), ids), session(two, ids))


@pytest.mark.parametrize("loop", ["joined", "lists"])
def test_a_compile_of_the_users_own_gives_the_same(loop):
    torch._dynamo.reset()
    plain, model = build(loop, num_hidden_layers=1), offload(build(loop, num_hidden_layers=1), 0.5)
    assert torch.equal(plain(prompt()).logits, torch.compile(model, backend="eager")(prompt()).logits)
    x = torch.randn(1, 5, 32)
    for part in ("model.layers.0.mlp", "model.layers.0.mlp.experts.mlp" if loop == "joined" else "lm_head"):
        read = (torch.randn(48, 32),) * 3 if part.endswith("experts.mlp") else ()
        want = plain.get_submodule(part)(x, *read)
        assert torch.equal(want, torch.compile(model.get_submodule(part), backend="eager")(x, *read))


#: Families of transformers, each of another way.
FAMILIES = ("dbrx", "step3p7", "longcat_flash", "jetmoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_read_row_by_row(family, tmp_path):
    built = build_family(family)
    built.save_pretrained(tmp_path)
    plain = type(built).from_pretrained(tmp_path)
    model = moe_offload.from_pretrained(tmp_path, "1GB", config={"poison": True})
    options = {"batch": 2, "new_tokens": 4}
    assert same(run_session(plain, "lm", **options), run_session(model, "lm", **options))
    want, got = plain.state_dict(), model.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    model.save_pretrained(tmp_path / "again")
    again = type(plain).from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(want[key], again[key]) for key in want)
