"""A module per expert: every loop of `fakes/loops`, exact, and reading what it needs."""

from __future__ import annotations

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import moe_offload
from moe_offload.apps.families.session import run_session
from moe_offload.apps.families.table import FAMILIES
from moe_offload.apps.families.tiny import build as build_family
from moe_offload.errors import ClosedError, ConfigError, OffloadError, UnsupportedModelError
from moe_offload.forward import binding
from tests.fakes import stack_models
from tests.fakes.loop_models import LOOP_NAMES, SETTINGS, build, offload, prompt, same, session


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_outputs_are_the_plain_models(loop, dtype):
    for batch, length in ((1, 16), (3, 33)):
        ids = prompt(batch, length)
        want = session(build(loop, dtype), ids)
        for residency in (0.0, 0.5, 1.0):
            model = offload(build(loop, dtype), residency)
            assert same(want, session(model, ids)), (batch, residency)
            model.moe_offload.close()


def test_a_slot_is_enough():
    model = offload(build())
    assert set(model.moe_offload.plan.slots) == {1}
    assert same(session(build(), prompt()), session(model, prompt()))


def test_generate_says_the_same():
    want = build().generate(prompt(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    got = offload(build()).generate(prompt(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(want, got)


def test_no_row_is_read_for_an_input_without_rows():
    """The one-hot loop calls every expert of the layer; the other calls those that are hit."""
    reads = {}
    for loop in ("one_hot", "hits"):
        model = offload(build(loop, num_hidden_layers=1), 1.0)
        model(prompt(1, 1))
        reads[loop] = model.moe_offload.stats().misses
    assert reads == {"one_hot": 2, "hits": 2}


def test_bytes_read_are_those_of_the_experts_in_use():
    model = offload(build(num_hidden_layers=1), 1.0)
    session(model, prompt())
    stats = model.moe_offload.stats()
    used = sum(count > 0 for count in model.moe_offload.profile().counts[0])
    row_bytes = sum(field.nbytes for field in model.moe_offload.moe_layers[0].layout.fields)
    assert stats.misses == used and stats.bytes_read == used * row_bytes


def test_counters_and_profile_are_those_of_the_routing():
    """16 tokens and 6 steps of top-2, two layers; each event asks for an expert once."""
    model = offload(build(), 0.5)
    session(model, prompt())
    stats = model.moe_offload.stats()
    assert stats.events == 2 * 7 and stats.tokens == 22
    assert stats.requests == stats.hits + stats.misses and 2 * 7 <= stats.requests <= 2 * (8 + 6 * 2)
    assert [sum(counts) for counts in model.moe_offload.profile().counts] == [44, 44]


def test_a_trace_has_the_ids_of_the_routing():
    plain, seen = build(), []
    for layer in plain.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: seen.append(out[0].sort(-1).values))
    session(plain, prompt())
    model = offload(build(), 0.5)
    model.moe_offload.start_trace()
    session(model, prompt())
    trace = model.moe_offload.trace()
    want = torch.cat([torch.stack(pair, 1) for pair in zip(seen[::2], seen[1::2], strict=True)])
    assert trace.experts_TLK.shape == (22, 2, 2)
    decode = torch.from_numpy(trace.experts_TLK[16:].copy()).sort(-1).values
    assert torch.equal(decode.long(), want[16:])


def test_a_hint_reads_ahead():
    model = offload(build(), 0.5)
    session(model, prompt())
    assert model.moe_offload.stats().ahead > 0


def without_torch_function(w):
    with torch._C.DisableTorchFunctionSubclass():
        return w @ w.t()


class TestWeightsOutsideOfACall:
    """Never NaN: it raises, and says whose weights they are."""

    @pytest.mark.parametrize(
        "read",
        [
            lambda w: w @ w.t(),
            lambda w: w.sum(),
            lambda w: w.to(torch.float64),
            lambda w: w.clone(),
            lambda w: w[0],
            lambda w: w.data,
            lambda w: w.numpy(),
            lambda w: torch.nn.functional.linear(torch.ones(1, 32), w),
            lambda w: torch.stack([torch.zeros(48, 32), w]),
            lambda w: torch.ops.aten.add(w, 1),
            lambda w: w.mul_(2),
            lambda w: w.tolist(),
            lambda w: w.contiguous(),
            copy.deepcopy,
            without_torch_function,
        ],
    )
    def test_it_raises_by_name(self, read):
        model = offload(build())
        weight = model.model.layers[1].mlp.experts[3].w1.weight
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts\.3\.w1\.weight"):
            read(weight)

    def test_it_may_be_looked_at(self):
        plain, weight = (m.model.layers[1].mlp.experts[3].w1.weight for m in (build(), offload(build())))
        for look in (
            lambda w: (w.shape, w.dtype, w.device, w.ndim, w.requires_grad and False, w.is_meta, len(w)),
            lambda w: (w.size(), w.dim(), w.numel(), w.element_size(), w.nbytes, w.is_floating_point()),
            lambda w: (w.stride(), w.is_contiguous()),
            lambda w: isinstance(w, torch.nn.Parameter),
        ):
            assert look(weight) == look(plain)
        assert "experts.3.w1.weight" in repr(weight)

    def test_a_parent_that_reads_them_is_refused(self):
        model = offload(build())
        block = model.model.layers[0].mlp
        block.run = lambda x, ids, weights: x @ block.experts[0].w1.weight.t() @ block.experts[0].w2.weight.t()
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts\.0\.w1\.weight"):
            model(prompt())

    def test_they_are_back_after_a_call_and_after_an_error(self):
        model = offload(build())
        expert = model.model.layers[0].mlp.experts[0]
        phantom = expert.w1.weight
        assert expert(torch.ones(1, 32)).shape == (1, 32) and expert.w1.weight is phantom
        handle = expert.w2.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            expert(torch.ones(1, 32))
        assert expert.w1.weight is phantom
        handle.remove()
        assert same(session(build(), prompt()), session(model, prompt()))


class TestAWeightThatIsReplaced:
    """It was computed with what the slot holds, without a word."""

    def test_by_that_of_another_expert(self):
        """One expert's code, called with the weights of all: refused, since they are not in memory."""
        model = offload(build(), 0.5)
        experts = model.model.layers[0].mlp.experts
        for other, called in (experts[3], "experts.0.w1.weight"), (experts[0], None):
            call = lambda other=other: torch.func.functional_call(  # noqa: E731
                experts[0], dict(other.named_parameters()), (torch.ones(1, 32),)
            )
            if called is None:
                assert torch.equal(call(), build().model.layers[0].mlp.experts[0](torch.ones(1, 32)))
            else:
                with pytest.raises(UnsupportedModelError, match=called):
                    call()

    @pytest.mark.parametrize("how", ["assigned", "deleted", "called with"])
    def test_by_a_real_one(self, how):
        model, x = offload(build(), 0.5), torch.ones(1, 32)
        expert, real = model.model.layers[1].mlp.experts[2], torch.nn.Parameter(torch.ones(48, 32))
        phantom = expert.w1.weight
        if how == "assigned":
            expert.w1.weight = real
        elif how == "deleted":
            del expert.w1.weight
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts\.2\.w1\.weight: another"):
            torch.func.functional_call(expert, {"w1.weight": real}, (x,)) if how == "called with" else expert(x)
        if how == "called with":
            assert expert.w1.weight is phantom


def test_a_kept_view_of_a_slot_is_refused():
    model, kept = offload(build()), []
    model.model.layers[0].mlp.experts[0].w1.register_forward_hook(lambda m, *_: kept.append(m.weight))
    with pytest.raises(UnsupportedModelError, match="kept a view"):
        model.model.layers[0].mlp.experts[0](torch.ones(1, 32))


def test_a_weight_that_is_returned_is_a_copy():
    plain, model = build(), None
    for one in (plain, model := build()):
        for expert in one.model.layers[0].mlp.experts:
            expert.forward = lambda x, expert=expert: expert.w2.weight
    want = [expert(None).clone() for expert in plain.model.layers[0].mlp.experts]
    offload(model)
    got = [expert(None) for expert in model.model.layers[0].mlp.experts]
    assert same(want, got)


def test_weights_that_change_themselves_are_refused():
    model = build()
    for expert in model.model.layers[0].mlp.experts:
        expert.register_forward_pre_hook(lambda *_: None)
        expert.forward = lambda x, expert=expert: expert.w1.weight.mul_(2)
    offload(model)
    with pytest.raises(UnsupportedModelError, match="changes its own weights"):
        model.model.layers[0].mlp.experts[0](torch.ones(1, 32))


def test_hooks_inside_and_around_experts_see_what_they_see_in_the_plain_model():
    def seen(model):
        found = []
        expert = model.model.layers[0].mlp.experts[1]
        expert.register_forward_hook(lambda _, args, out: found.append((args[0].clone(), out.clone())))
        expert.w1.register_forward_hook(lambda m, args, out: found.append((m.weight.clone(), out.clone())))
        session(model, prompt())
        return [x for pair in found for x in pair]

    plain = seen(build())
    assert plain and same(plain, seen(offload(build())))


def test_an_expert_that_calls_another_one_needs_a_second_slot():
    def nest(model):
        experts = model.model.layers[0].mlp.experts
        inner = experts[0].forward
        experts[0].forward = lambda x: inner(x) + experts[1](x)
        return model

    x = torch.ones(1, 32)
    want = nest(build()).model.layers[0].mlp.experts[0](x).detach()
    small, large = offload(nest(build())), offload(nest(build()), 0.5)
    with pytest.raises(UnsupportedModelError, match="called inside of"):
        small.model.layers[0].mlp.experts[0](x)
    assert torch.equal(want, large.model.layers[0].mlp.experts[0](x).detach())


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_an_encoder_and_a_decoder_from_their_files(family, tmp_path):
    plain = build_family(family)
    plain.save_pretrained(tmp_path)
    model = moe_offload.from_pretrained(tmp_path, "1GB", config=SETTINGS)
    assert type(model) is type(plain)
    kind, options = FAMILIES[family].kind, {"batch": 2, "new_tokens": 4}
    assert same(run_session(plain, kind, **options), run_session(model, kind, **options))
    assert model.moe_offload.stats().bytes_read > 0
    ids, words = prompt(2, 9) + 3, {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(ids, **words), model.generate(ids, **words))
    want, got = plain.state_dict(), model.state_dict()
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("residency", [0.0, 0.5])
def test_an_expert_that_calls_itself_keeps_its_weights_until_it_ends(residency):
    def nest(model):
        for expert in model.model.layers[0].mlp.experts:
            once = expert.forward
            expert.forward = lambda x, again=True, once=once, own=expert: once(own(x, again=False) if again else x)
        return model

    assert same(session(nest(build()), prompt()), session(offload(nest(build()), residency), prompt()))


def test_threads_share_one_model():
    ids = [prompt(1, 16, seed) for seed in range(4)]
    want = [session(build(), one) for one in ids]
    model, got = offload(build()), {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: session(model, ids[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(want[i], got[i]) for i in range(4))


@pytest.mark.parametrize("loop", ["hits", "stacked"])
def test_experts_in_threads_that_the_models_code_starts_are_refused(loop, monkeypatch):
    """They waited for the call of the model to end, which waited for them."""
    monkeypatch.setattr(binding, "TURN_S", 0.2)
    model = offload(stack_models.build(loop))
    block = model.model.layers[0].mlp
    run = block.run

    def elsewhere(*args):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run, *args).result()

    block.run = elsewhere
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts.* in a thread of their own"):
        model(prompt())


def test_two_models_in_a_process():
    first, second = offload(build("hits", seed=1)), offload(build("one_hot", seed=2))
    ids = prompt()
    for _ in range(2):
        assert same(session(build("hits", seed=1), ids), session(first, ids))
        assert same(session(build("one_hot", seed=2), ids), session(second, ids))


def test_a_torch_compile_of_the_users():
    model = torch.compile(offload(build()), backend="eager")
    assert same(session(build(), prompt()), session(model, prompt()))


def test_parts_of_the_model_may_be_called():
    x = torch.randn(1, 5, 32)
    want = build().model.layers[1].mlp(x).detach()
    model = offload(build())
    part = model.model.layers[1].mlp
    assert torch.equal(want, part(x).detach())
    with pytest.raises(OffloadError, match="inference only"):
        part(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("target", ["qkv", "w1"], ids=["in attention", "in experts"])
def test_an_adapter_does_what_it_does_on_the_plain_model(target):
    """Inside of an expert it sees the weights that the plain model has: it may be there as well."""
    peft = pytest.importorskip("peft")

    def adapt(model):
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], init_lora_weights=False))
        generator = torch.Generator().manual_seed(0)
        for name, param in adapted.named_parameters():
            if "lora_" in name:
                param.data.copy_(torch.randn(param.shape, generator=generator))
        return adapted.eval()

    plain, want = session(build(), prompt()), session(adapt(build()), prompt())
    assert not same(plain, want) and same(want, session(adapt(offload(build())), prompt()))


def test_a_model_may_be_frozen():
    model = offload(build())
    model.requires_grad_(False)
    model.zero_grad()
    assert same(session(build(), prompt()), session(model, prompt()))


def test_state_dict_and_saving_have_the_real_weights(tmp_path):
    plain, model = build(), offload(build())
    want, got = plain.state_dict(), model.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(want[key], again[key]) for key in want)


def test_moving_copying_and_loading_are_refused():
    model = offload(build())
    for change in (
        lambda: model.to(torch.bfloat16),
        lambda: model.model.layers[0].mlp.experts[0].half(),
        lambda: copy.deepcopy(model),
        lambda: copy.deepcopy(model.model.layers[0].mlp.experts[0]),
        lambda: model.load_state_dict(build().state_dict()),
    ):
        with pytest.raises(OffloadError):
            change()


def test_where_experts_are_called_the_host_decides():
    settings = dataclasses.replace(SETTINGS, decide="device")
    with pytest.raises(ConfigError, match="one by one"):
        offload(build(), 0.5, settings)


def test_after_close_it_raises():
    model = offload(build())
    model.moe_offload.close()
    with pytest.raises(ClosedError):
        model(prompt())
    with pytest.raises(ClosedError):
        model.model.layers[0].mlp.experts[0](torch.ones(1, 32))


def test_a_plain_model_can_be_profiled_too():
    recorded = moe_offload.record_profile(build(), [prompt(), prompt(3, 5)])
    model = offload(build(), 0.5, profile=recorded)
    session(model, prompt(), steps=0)
    model(prompt(3, 5))
    assert recorded.counts == model.moe_offload.profile().counts and recorded.tokens == 31
    assert model.moe_offload.stats().prewarm_bytes > 0
