"""An offloaded model from outside: the same object, class, tokens and weights; what is refused; what is given back."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import moe_offload
from moe_offload import BudgetError, ClosedError, ConfigError, OffloadError, ProfileError
from moe_offload.apps.families.tiny import build
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, offloaded, resident, say


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()  # all plain models share one code object, and its recompilations are limited


def descriptors():
    gc.collect()  # whatever has only been dropped, by this test or an earlier one
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("family", "layers", "tiers"), [(QWEN, 2, ["cpu", "disk"]), ("gpt_oss", 1, ["disk"]), ("deepseek_v3", 2, ["cpu"])]
)
def test_the_same_object_says_the_same_tokens(family, layers, tiers):
    want = say(resident(family, layers=layers))
    assert len(want.unique()) > 4, "a reference that repeats itself shows nothing"
    for tier in tiers:
        model = build(family, num_hidden_layers=layers)
        kind = type(model)
        assert offload(model, device_map=tier) is model and type(model) is kind
        assert set(model.moe_offload.tiers) == {"host" if tier == "cpu" else "disk"}
        assert torch.equal(say(model), want), tier
        assert len(model.moe_offload.graphs) <= 3, "a graph a token"
        stats = model.moe_offload.stats()
        assert stats.misses > 0 and stats.tokens == IDS.numel() + 19
        model.moe_offload.close()


def test_calls_that_no_pass_sees_give_the_same_result():
    plain, model = resident(), offloaded()
    with torch.no_grad():
        want = plain(IDS).logits
        inner = model.model(IDS).last_hidden_state  # eager: past the model's own compiled call
        torch.testing.assert_close(inner, plain.model(IDS).last_hidden_state, rtol=0, atol=1e-5)
        outer = torch.compile(model, backend="eager")(IDS).logits  # somebody else's compilation
        torch.testing.assert_close(outer, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=1e-5)  # and ours still works


def test_state_dict_and_save_pretrained_give_the_real_weights(tmp_path):
    want, model = build(QWEN, num_hidden_layers=1).state_dict(), offloaded()
    assert any(p.isnan().any() for p in model.parameters()), "nothing was offloaded"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    for got in (model.state_dict(), again):
        assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


# What is refused.


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.to("meta")])
def test_converting_or_moving_is_refused(move):
    model = offloaded()
    with pytest.raises(OffloadError, match=r"first, then call optimize\(\); .*close\(\) frees"):
        move(model)
    assert model.to("cpu") is model and model.float() is model  # these change nothing


def test_a_second_optimize_and_training_are_refused():
    model = offloaded()
    with pytest.raises(OffloadError, match="already offloaded"):
        offload(model)
    model.train()
    with pytest.raises(OffloadError, match="inference only"):
        model(IDS)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_with_advice(duplicate):
    with pytest.raises(OffloadError, match=r"before\s+optimize\(\)"):
        duplicate(offloaded())


@pytest.mark.parametrize("inner_first", [True, False])
def test_optimizing_part_of_an_offloaded_model_or_the_whole_of_one_in_parts_is_refused(inner_first):
    model = build(QWEN, num_hidden_layers=1)
    first, second = (model.model, model) if inner_first else (model, model.model)
    offload(first)
    with pytest.raises(OffloadError):
        offload(second)


def test_what_max_memory_leaves_beside_the_budget_holds_rows_in_ram():
    want = say(resident(layers=2))
    model = offloaded(layers=2)  # to know its budget
    budget, moe = model.moe_offload.plan.budget_bytes, model.moe_offload.moe_layers[0]
    model.moe_offload.close()
    limit = {"cpu": budget + moe.nbytes}
    model = moe_offload.optimize(build(QWEN, num_hidden_layers=2), budget, max_memory=limit, config=SETTINGS)
    assert model.moe_offload.tiers == ["host", "disk"] and torch.equal(say(model), want)
    model.moe_offload.close()


BAD = {
    "budget below the floor": ({"budget": "100KB"}, BudgetError),
    "a budget over the limit": ({"max_memory": {"cpu": "1KB"}}, BudgetError),
    "a size that cannot be read": ({"budget": "8 gigs"}, ConfigError),
    "a misspelt module": ({"device_map": {"model.layer.1": "cpu"}}, ConfigError),
    "a device we lack": ({"device_map": "cuda"}, OffloadError),
    "a misspelt setting": ({"config": {"halflife": 3}}, ConfigError),
    "no folder to spill to": ({"config": {"offload_folder": "/no/such/folder"}}, OffloadError),
    "no folder to spill to, as an argument": ({"offload_folder": "/no/such/folder"}, OffloadError),
    "a damaged profile": ({"profile": "damaged"}, ProfileError),
    "another model's profile": ({"profile": "other"}, ProfileError),
}


@pytest.mark.parametrize(("options", "error"), BAD.values(), ids=BAD)
def test_a_failed_optimize_changes_nothing(options, error, tmp_path):
    if options.get("profile") == "damaged":
        path = tmp_path / "damaged.json"
        path.write_text('{"format": "moe_offload.profile", "vers')
        options = {"profile": path}
    elif options.get("profile") == "other":
        options = {"profile": offloaded("gpt_oss").moe_offload.profile()}
    model, open_before = build(QWEN, num_hidden_layers=1), descriptors()
    state = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    want, attributes, config = model(IDS).logits, set(vars(model)), model.config.to_dict()
    with pytest.raises(error):
        offload(model, **options)
    assert set(vars(model)) == attributes and model.config.to_dict() == config and descriptors() == open_before
    assert all(id(p) == state[name][0] and torch.equal(p, state[name][1]) for name, p in model.named_parameters())
    assert torch.equal(model(IDS).logits, want)


# Closing.


def test_close_and_leaving_the_context_end_it():
    with offloaded().moe_offload as handle:
        assert not handle.closed and "closed" not in repr(handle)
    assert handle.closed and "closed" in str(handle)
    model = offloaded()
    model.moe_offload.close()
    model.moe_offload.close()
    for use in (lambda: model(IDS), model.state_dict):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_calling_a_part_of_a_closed_model_is_a_closed_error():
    model = offloaded()
    model.moe_offload.close()
    with pytest.raises(ClosedError):
        model.model(IDS)


@pytest.mark.parametrize("closing", [True, False], ids=["closed", "only deleted"])
def test_nothing_is_left_open(closing):
    offloaded()  # whatever the first time opens for good
    before = descriptors(), threading.active_count()
    for _ in range(20):
        model = offloaded(layers=2, device_map={"": "disk", "model.layers.1": "cpu"})
        if closing:
            model.moe_offload.close()
        del model
    assert (descriptors(), threading.active_count()) == before


@pytest.mark.parametrize(
    "tier",
    [
        "disk",
        "cpu",
    ],
)
def test_a_checkpoint_is_not_left_open(tier, tmp_path):
    build(QWEN, num_hidden_layers=1).save_pretrained(tmp_path)
    before = descriptors()
    for _ in range(2):
        moe_offload.from_pretrained(tmp_path, "2MB", device_map=tier, config=SETTINGS).moe_offload.close()
    assert descriptors() == before


# Several at once.


def test_two_models_and_two_threads():
    seeds, prompts = (0, 1), (IDS, IDS + 40)
    want = {}
    for seed in seeds:
        plain = resident(seed=seed)  # without a graph: the same kernels all the same
        want |= {(seed, i): say(plain, prompt, 8) for i, prompt in enumerate(prompts)}
    models = [offloaded(seed=seed) for seed in seeds]
    assert all(torch.equal(say(models[seed], prompts[i], 8), tokens) for (seed, i), tokens in want.items())
    assert models[0].moe_offload.stats().tokens == 2 * (IDS.numel() + 7)
    jobs = [*want] * 3  # both prompts on both models, at the same time
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda job: say(models[job[0]], prompts[job[1]], 8), jobs))
    assert all(torch.equal(got, want[job]) for got, job in zip(done, jobs, strict=True))
    models[0].moe_offload.close()
    assert torch.equal(say(models[1], IDS, 8), want[1, 0])


def test_parts_of_a_model_may_be_called_from_two_threads():
    model, prompts = offloaded(), (IDS, IDS + 40)
    with torch.no_grad():
        want = model.model(prompts[0]).last_hidden_state
    layer = model.moe_offload._runtime.layers[0]
    take, inside, other_is_done = layer.arrivals.take, threading.Event(), threading.Event()

    def take_slowly(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            other_is_done.wait(1)  # in vain, if the other has to wait for us
        return take(*args, **kwargs)

    layer.arrivals.take = take_slowly
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        got = pool.submit(model.model, prompts[0])
        assert inside.wait(120)
        model.model(prompts[1])
        other_is_done.set()
        assert torch.equal(got.result().last_hidden_state, want)


# Profiles.


def test_a_profile_is_the_same_with_and_without_offload_and_changes_only_hits():
    batches = [IDS, {"input_ids": IDS + 30}]
    plain = build(QWEN, num_hidden_layers=1)
    want, chosen = plain(IDS).logits, plain.config._experts_implementation
    profile = moe_offload.record_profile(plain, batches, language="it")
    assert torch.equal(plain(IDS).logits, want) and plain.config._experts_implementation == chosen
    assert profile.tokens == 2 * IDS.numel() and profile.meta == {"language": "it"}

    cold, warm = offloaded(residency=0.5), offloaded(residency=0.5, profile=profile)
    assert warm.moe_offload.stats().prewarm_bytes > 0 == cold.moe_offload.stats().prewarm_bytes
    assert torch.equal(cold(IDS).logits, warm(IDS).logits)
    assert cold.moe_offload.stats().hits < warm.moe_offload.stats().hits
    assert moe_offload.record_profile(cold, batches).counts == profile.counts


def test_recording_again_and_again_counts_again():
    with torch._dynamo.config.patch(recompile_limit=1):
        totals = [sum(moe_offload.record_profile(build(QWEN, num_hidden_layers=1), IDS).counts[0]) for _ in range(2)]
    assert totals[0] == totals[1] > 0


def test_a_model_that_has_chosen_the_loop_over_experts_says_so(tmp_path):
    """Its last bits are those of no implementation that can be offloaded."""
    model = build("qwen3_moe")
    model.set_experts_implementation("eager")
    with pytest.raises(moe_offload.UnsupportedModelError, match=r"layers\.0\.mlp\.experts: .*'eager'.*'grouped_mm'"):
        moe_offload.optimize(model, "1GB", device_map="cpu")
    build("openai_privacy_filter").save_pretrained(tmp_path)  # its class chooses so
    with pytest.raises(moe_offload.UnsupportedModelError, match="'eager'"):
        moe_offload.from_pretrained(tmp_path, "1GB")
    chosen = {"experts_implementation": "grouped_mm", "profile": "off"}
    moe_offload.from_pretrained(tmp_path, "1GB", config=chosen).moe_offload.close()


@pytest.mark.parametrize(
    "write",
    [
        lambda experts: experts.down_proj.data.zero_(),
        lambda experts: experts.gate_up_proj.data[3].fill_(1.0),
        lambda experts: setattr(experts.gate_up_proj, "data", torch.zeros(experts.gate_up_proj.shape)),
    ],
)
def test_what_is_written_to_experts_afterwards_is_refused_though_torch_counts_it_not(write):
    model = moe_offload.optimize(build("qwen3_moe"), "1GB", device_map="cpu")
    model(torch.tensor([[3, 4, 5]]))
    write(model.model.layers[1].mlp.experts)
    with pytest.raises(OffloadError, match=r"written to after optimize\(\)"):
        model(torch.tensor([[3, 4, 5]]))


def test_another_experts_implementation_set_afterwards_is_refused():
    model = moe_offload.optimize(build("qwen3_moe"), "1GB", device_map="cpu")
    model.set_experts_implementation("eager")
    with pytest.raises(OffloadError, match="experts implementation was set to 'eager'"):
        model(torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backward_is_refused_wherever_plain_transformers_has_one(frozen):
    plain, model = resident(layers=2).requires_grad_(not frozen), offloaded(layers=2).requires_grad_(not frozen)
    embeds = torch.ones(1, 4, plain.config.hidden_size)
    calls = {
        "logits": lambda m: m(IDS).logits,
        "loss": lambda m: m(IDS, labels=IDS).loss + 1,
        "a state": lambda m: m(IDS, output_hidden_states=True).hidden_states[-1],
        "tuple": lambda m: m(IDS, return_dict=False)[0],
        "part": lambda m: m.model(IDS).last_hidden_state,
        "embeddings": lambda m: m(inputs_embeds=embeds.clone().requires_grad_()).logits,
    }
    for name, call in calls.items():
        want, got = call(plain), call(model)
        assert torch.equal(want, got) and got.requires_grad == want.requires_grad, name
        if want.requires_grad:
            with pytest.raises(OffloadError, match=r"inference only.*before optimize\(\)"):
                got.sum().backward()
        with torch.no_grad():
            assert not call(model).requires_grad


def test_a_row_that_cannot_be_read_while_prewarming_closes_the_model(monkeypatch):
    with offloaded().moe_offload as handle:
        say(handle.model)
        profile = handle.profile()
    files = descriptors()

    def fails(*_):
        raise moe_offload.ExpertReadError("EIO")

    monkeypatch.setattr("moe_offload.runtime.prewarm.prewarm_slots", fails)
    model = build(QWEN, num_hidden_layers=1)
    with pytest.raises(moe_offload.ExpertReadError, match="EIO"):
        moe_offload.optimize(model, "200MB", profile=profile)
    assert model.moe_offload.closed and descriptors() == files
    with pytest.raises(ClosedError):
        say(model)


def test_a_long_prompt_in_pieces(caplog):
    """By itself where the budget keeps no room for activations, in the size that was asked for, and in none for a call
    of the model: its logits are those of the unmodified model, which are not the same in pieces."""
    ids = torch.randint(3, 90, (1, 600), generator=torch.Generator().manual_seed(1))
    unmodified, model = (build("qwen3_moe", max_position_embeddings=1024) for _ in range(2))
    moe_offload.optimize(model, "200MB", device_map="cpu", config={"reserve": 0})
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with caplog.at_level("WARNING", "moe_offload"):
        pieces = [model.generate(ids, **asked), model.generate(ids, prefill_chunk_size=128, **asked)]
        assert not caplog.records
        model(ids)
        logits = model(ids).logits
    assert torch.equal(pieces[0], unmodified.generate(ids, prefill_chunk_size=120, **asked))
    assert torch.equal(pieces[0], pieces[1])
    assert torch.equal(logits, unmodified(ids).logits)
    assert len(caplog.records) == 1 and "past_key_values" in caplog.text and "600 tokens" in caplog.text


def test_another_default_device_changes_nothing():
    """As of a program that sets `torch.set_default_device("cuda")`, and computes this model on the CPU."""
    want, model = resident(layers=2)(IDS).logits, build(QWEN, num_hidden_layers=2)
    with torch.device("meta"):
        offload(model)
        assert torch.equal(model(IDS).logits, want)
    assert model.moe_offload.stats().misses
