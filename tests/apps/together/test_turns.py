"""Several `generate` calls in turns: each says what it says alone, to the bit, whatever becomes of the others."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("greenlet")

import moe_offload
from moe_offload import ExpertReadError
from moe_offload.apps.families.tiny import build
from moe_offload.apps.together import turns as turns_module
from moe_offload.apps.together.turn import Turn
from moe_offload.apps.together.turns import Turns
from moe_offload.errors import ClosedError, ServeError
from moe_offload.memory.stores.host import HostStore
from moe_offload.memory.stores.row_read import RowRead
from moe_offload.packed import in_lanes as lanes
from moe_offload.patch import exact_products
from moe_offload.runtime.kernels import exact_rows
from tests.fakes import loop_models
from tests.fakes.offloaded import QWEN, SETTINGS, offload

LENGTHS = [(5, 14), (19, 9), (1, 20), (12, 11)]  # of prompts, and of what follows them


@pytest.fixture(autouse=True)
def _gradients_are_as_before():
    yield
    assert torch.is_grad_enabled()


def prompt_of(i):
    return torch.randint(3, 60, (1, LENGTHS[i][0]), generator=torch.Generator().manual_seed(i))


def answer(model, i, **options):
    """The tokens and the logits of one request."""
    settings = {
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
        **options,
    }
    n = LENGTHS[i][1]
    out = model.generate(prompt_of(i), max_new_tokens=n, min_new_tokens=n, **settings)
    return torch.cat([out.sequences[0].double(), *(logits[0].double() for logits in out.logits)])


def run(model, works, most=None, seeded=False, turns=None):
    """The outcome of each: what it returned, or its error."""
    found = [None] * len(works)

    def turn(i, work):
        def keep():
            found[i] = work()

        def done(error):
            found[i] = found[i] if error is None else error

        return Turn(keep, done, seeded=seeded)

    waiting = [turn(i, work) for i, work in enumerate(works)]
    turns = turns or Turns(model, most or len(works))
    turns.run(lambda: waiting.pop(0) if waiting else None)
    return found


def works_of(model, **options):
    return [lambda i=i: answer(model, i, **options) for i in range(len(LENGTHS))]


def same(want, got):
    return [isinstance(b, torch.Tensor) and torch.equal(a, b) for a, b in zip(want, got, strict=True)]


def made(residency=0.25, family=QWEN, dtype=torch.float32, layers=3, **options):
    return offload(build(family, num_hidden_layers=layers, dtype=dtype), residency, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residency", [0.0, 0.25, 0.5, 1.0])
def test_each_says_what_it_says_alone(residency, dtype):
    model = made(residency, dtype=dtype)
    want = [answer(model, i) for i in range(len(LENGTHS))]
    for most in (4, 3):
        assert all(same(want, run(model, works_of(model), most)))
    assert all(same(want, [answer(model, i) for i in range(len(LENGTHS))]))


def test_one_event_serves_all_and_a_row_is_read_once():
    model = made(0.5, layers=2)
    works = [lambda: answer(model, 0)] * 4
    alone = answer(model, 0)
    before = model.moe_offload.stats()
    found = run(model, works)
    after = model.moe_offload.stats()
    assert all(same([alone] * 4, found))
    steps = LENGTHS[0][1] - 1
    assert after.events - before.events == 2 * (4 + steps)  # four prompts, and the steps of all of them
    assert after.tokens - before.tokens == 4 * (LENGTHS[0][0] + steps)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_oss", {}),  # sliding windows
        ("qwen3_next", {}),  # linear attention
        (QWEN, {"cache_implementation": "static"}),
        ("qwen2_moe", {"use_cache": False}),
    ],
)
def test_caches_of_all_kinds(family, options):
    model = made(0.25, family)
    answer(model, 1, **options)  # static caches are as long as the longest yet
    want = [answer(model, i, **options) for i in range(len(LENGTHS))]
    assert all(same(want, run(model, works_of(model, **options))))


@pytest.mark.parametrize("loop", loop_models.LOOP_NAMES[:4])
def test_experts_that_are_called_take_turns_from_step_to_step(loop):
    model = loop_models.offload(loop_models.build(loop), 0.25)
    want = [loop_models.session(model, loop_models.prompt(seed=seed)) for seed in range(3)]
    works = [lambda seed=seed: loop_models.session(model, loop_models.prompt(seed=seed)) for seed in range(3)]
    assert all(loop_models.same(a, b) for a, b in zip(want, run(model, works), strict=True))


def test_without_overlap_and_compiled_whole_they_take_turns_from_step_to_step():
    for changes in ({"overlap": False}, {"fullgraph": True}):
        model = made(0.25, config={**SETTINGS.to_dict(), **changes})
        want = [answer(model, i) for i in range(len(LENGTHS))]
        assert all(same(want, run(model, works_of(model))))


@pytest.fixture
def sharing(monkeypatch):
    """A model whose experts and linear layers may have rows of several calls, as large ones have."""
    if lanes.load_kernels() is None and exact_products.multiplier() is None:
        pytest.skip("torch adds up in another order on this processor, or numba is not here")
    for module in (exact_products, exact_rows):
        monkeypatch.setattr(module, "LARGE", 1)
    return lambda residency=0.25, **options: offload(
        build(QWEN, num_hidden_layers=2, dtype=torch.bfloat16, moe_intermediate_size=128), residency, **options
    )


@pytest.mark.parametrize("residency", [0.0, 0.25, 1.0])
def test_products_have_rows_of_all_where_each_is_as_alone(sharing, residency):
    model = sharing(residency)
    want = [answer(model, i) for i in range(len(LENGTHS))]
    turns = Turns(model, 4)
    assert all(same(want, run(model, works_of(model), turns=turns)))
    assert set(turns._alike.values()) == {True} and {count for _, count, _ in turns._alike} == {2, 3, 4}
    experts = {id(module) for layer in model.moe_offload.moe_layers for module in layer.modules}
    met = {module for module, _, _ in turns._alike}
    assert experts < met and id(model.lm_head) in met
    assert all(same(want, run(model, works_of(model), turns=turns))), "when nothing is compared any more"
    assert not any(exact_products.MEETING in vars(module) for module in model.modules())


def test_where_rows_are_not_as_alone_each_is_computed_alone(sharing, monkeypatch):
    model = sharing()
    want = [answer(model, i) for i in range(len(LENGTHS))]
    real = exact_products.multiply_rows
    monkeypatch.setattr(turns_module, "multiply_rows", lambda linear, x: real(linear, x) * (1 if len(x) == 1 else 2))
    turns = Turns(model, 4)
    assert all(same(want, run(model, works_of(model), turns=turns)))
    assert False in turns._alike.values()


def test_a_row_that_cannot_be_read_fails_those_who_need_it_also_where_products_are_shared(sharing, monkeypatch):
    check_broken_rows(sharing(device_map="cpu"), monkeypatch)


def seeded(model, i):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(i)
        return answer(model, i, do_sample=True, temperature=2.0)


def test_who_draws_from_a_seed_draws_what_it_draws_alone():
    model = made()
    want = [seeded(model, i) for i in range(len(LENGTHS))]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = run(model, [lambda i=i: seeded(model, i) for i in range(len(LENGTHS))], seeded=True)
    assert all(same(want, found)) and torch.equal(torch.get_rng_state(), before)


class WrongError(Exception):
    pass


@pytest.mark.parametrize("at", ["attention", "experts", "sampling"])
def test_an_error_is_its_own(at):
    """Wherever it comes: between two layers, among the experts, or outside of the model."""
    model = made(layers=3)
    want = [answer(model, i) for i in range(len(LENGTHS))]
    victim, calls = prompt_of(0).shape[1] + 5, []

    def fail(*_):
        raise WrongError

    def fail_in_step(module, args, kwargs):
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # its name since transformers 5.24
        if cache is not None and cache.get_seq_length(2) == victim and kwargs["hidden_states"].shape[1] == 1:
            fail()

    def fail_after(_, scores):
        calls.append(1)
        if len(calls) == 5:
            fail()
        return scores

    works, hooks = works_of(model), []
    if at == "sampling":
        works[0] = lambda: answer(model, 0, logits_processor=[fail_after])
    elif at == "attention":
        hooks.append(model.model.layers[1].self_attn.register_forward_pre_hook(fail_in_step, with_kwargs=True))
        works = works[:3]  # no other sequence is ever as long in layer 2, which has not seen this step's token
    else:
        layer = model.moe_offload._runtime.layers[1]
        real = layer.stream

        def stream(x_P, ids_P, *rest):
            if layer.joint.begun:
                calls.append(1)
                if len(calls) == 6:
                    fail()
            return real(x_P, ids_P, *rest)

        layer.stream = stream
    found = run(model, works)
    for hook in hooks:
        hook.remove()
    failed = [i for i, one in enumerate(found) if isinstance(one, WrongError)]
    assert len(failed) >= 1 and all(same(want[i : i + 1], [one])[0] for i, one in enumerate(found) if i not in failed)
    assert len(failed) < len(found)
    if at == "experts":
        del layer.stream
    assert all(same(want, run(model, works_of(model))))
    assert not any(layer.cache.pending or layer.joint.begun for layer in model.moe_offload._runtime.layers)


def test_a_row_that_cannot_be_read_fails_those_who_need_it(monkeypatch):
    check_broken_rows(made(0.25, layers=2, device_map="cpu"), monkeypatch)


def check_broken_rows(model, monkeypatch):
    want = [answer(model, i) for i in range(len(LENGTHS))]
    real, broken = HostStore.begin, set()

    def begin(self, layer, expert, row):
        def part():
            if layer == 1 and expert in broken:
                raise ExpertReadError("the disk is gone")

        read = real(self, layer, expert, row)
        return RowRead([part, *read.parts], read.finish)

    monkeypatch.setattr(HostStore, "begin", begin)
    told = set()
    for expert in range(model.moe_offload.moe_layers[1].num_experts):
        broken = {expert}
        found = run(model, works_of(model))
        told |= {type(one) for one in found}
        assert all(right for one, right in zip(found, same(want, found), strict=True) if torch.is_tensor(one))
    assert told == {ExpertReadError, torch.Tensor}
    broken = set()
    assert all(same(want, run(model, works_of(model))))


def test_who_is_interrupted_ends_all_and_the_model_goes_on():
    model = made()
    want = [answer(model, i) for i in range(len(LENGTHS))]

    def interrupt(*_):
        raise KeyboardInterrupt

    works = works_of(model)
    works[2] = lambda: answer(
        model, 2, stopping_criteria=[lambda ids, _: interrupt() if ids.shape[1] > 5 else torch.zeros(1).bool()]
    )
    with pytest.raises(KeyboardInterrupt):
        run(model, works)
    assert all(same(want, run(model, works_of(model))))
    assert all(same(want, [answer(model, i) for i in range(len(LENGTHS))]))


def test_a_model_that_is_closed_tells_all_of_them():
    model = made()

    def close(ids, _):
        if ids.shape[1] > 8:
            model.moe_offload.close()
        return torch.zeros(1).bool()

    works = works_of(model)
    works[0] = lambda: answer(model, 0, stopping_criteria=[close])
    assert [type(one) for one in run(model, works, most=2)] == [ClosedError] * 4


def test_other_threads_have_the_model_between_two_steps():
    model = made()
    want = [answer(model, i) for i in range(len(LENGTHS))]
    found, begun = [], threading.Event()

    def other():
        begun.wait()
        found.append(answer(model, 3))

    thread = threading.Thread(target=other)
    thread.start()

    def first():
        begun.set()
        return answer(model, 0)

    assert all(same(want, run(model, [first, *works_of(model)[1:]])))
    thread.join()
    assert all(same(want[3:], found))


def test_a_trace_of_steps_together_replays_to_the_counters():
    from moe_offload.apps.simulate.plain import replay_policy
    from moe_offload.apps.simulate.stream import per_layer
    from moe_offload.cache import POLICIES

    model = made(0.5, layers=2, config={**SETTINGS.to_dict(), "prewarm": False})
    model.moe_offload.start_trace()
    run(model, works_of(model))
    trace, stats = model.moe_offload.trace(), model.moe_offload.stats()
    slots = model.moe_offload.plan.slots
    asked = hits = 0
    for stream, count in zip(per_layer(trace), slots, strict=True):
        asked_V, hits_V = replay_policy(stream, count, POLICIES[SETTINGS.policy](stream.num_experts, 32.0))
        asked, hits = asked + int(asked_V.sum()), hits + int(hits_V.sum())
    assert (stats.requests, stats.hits) == (asked, hits)


def test_what_remembers_other_calls_is_refused():
    model = offload(
        build(QWEN, num_hidden_layers=1, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    )
    with pytest.raises(ServeError, match=r"rotary_emb remembers the longest sequence.*--parallel 1"):
        Turns(model, 2)


def test_kv_caches_of_all_are_in_the_reserve():
    model = build(QWEN, num_hidden_layers=2)
    plans = [
        moe_offload.make_plan(model, "50MB", config={"kv_tokens": 64, "kv_sequences": n, "profile": "off"})
        for n in (1, 4)
    ]
    assert plans[1].costs.kv_bytes == 4 * plans[0].costs.kv_bytes > 0
