"""Threads that call a model which has no graph yet, beside whoever else compiles or closes; and forked processes.

`torch.compiler.is_compiling()` is true in every thread while one of them compiles. Whoever takes that for "I am traced"
computes with NaN, and an argmax makes tokens of it.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload import ClosedError, OffloadError
from moe_offload.apps.families.tiny import build
from moe_offload.forward.graphs import ops
from tests.fakes.offloaded import IDS, QWEN, offload, offloaded, resident, say
from tests.paths import MODEL

PROMPTS = [IDS, IDS[:, :1], IDS[:, :5], (IDS + 9).repeat(2, 1)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def want():
    plain = resident(layers=2)
    with torch.no_grad():
        return [plain(ids).logits for ids in PROMPTS], say(plain, n=4)


def call_from(threads, calls):
    """Each thread runs `calls`, all of them at once; what they return, or raise."""
    start = threading.Barrier(threads)

    def run(number):
        start.wait()
        return [call(number + i) for i, call in enumerate(calls)]

    with ThreadPoolExecutor(threads) as pool:
        return [one for part in pool.map(run, range(threads)) for one in part]


@pytest.mark.parametrize("threads", [2, 8])
def test_cold_models(want, threads):
    logits, said = want
    for whole_model in (True, False):
        model = offloaded(layers=2)

        def call(number, model=model, whole_model=whole_model):
            i = number % len(PROMPTS)
            with torch.no_grad():
                if whole_model:
                    return torch.equal(model(PROMPTS[i]).logits, logits[i])
                return torch.equal(model.lm_head(model.model(PROMPTS[i])[0]), logits[i])  # each layer takes the lock

        assert all(call_from(threads, [call] * 4))
        assert torch.equal(say(model, n=4), said)
        model.moe_offload.close()


def test_a_model_that_compiles_beside_others_that_do(want):
    """Another model of ours, a foreign compilation of a part of this one, and one that has nothing to do with it."""
    logits, _ = want
    model, other = offloaded(layers=2), offloaded(layers=2)
    part = torch.compile(model.model, backend="eager", dynamic=True)

    def foreign(number):
        dense = torch.nn.Linear(3 + number, 5)
        return torch.compile(dense, backend="eager")(torch.ones(2, 3 + number)).shape == (2, 5)

    def call(number):
        i = number % len(PROMPTS)
        with torch.no_grad():
            if number % 3 == 0:
                return torch.equal(other(PROMPTS[i]).logits, logits[i])
            if number % 3 == 1:
                got = model.lm_head(part(PROMPTS[i])[0])
                return torch.allclose(got, logits[i], rtol=0, atol=1e-5)
            return torch.equal(model(PROMPTS[i]).logits, logits[i])

    assert all(call_from(4, [foreign, call, foreign, call, call]))
    for each in (model, other):
        each.moe_offload.close()


def test_closing_beside_first_calls(want):
    logits, _ = want
    for _ in range(3):
        model = offloaded(layers=2)

        def call(number, model=model):
            try:
                with torch.no_grad():
                    return torch.equal(model(PROMPTS[number % 4]).logits, logits[number % 4])
            except ClosedError:
                return True

        def close(number, model=model):
            if number == 2:
                model.moe_offload.close()
            return True

        assert all(call_from(3, [call, close, call]))


def test_a_graph_that_our_passes_never_saw_raises_before_it_computes():
    """The last line of defence: whatever leads another compiler to trace what only ours may, it is not silent."""
    model = offload(build(QWEN, num_hidden_layers=1))
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = torch.ones(3, model.config.hidden_size), torch.tensor([[0, 1]] * 3), torch.ones(3, 2) / 2
    from moe_offload.forward.regions import make_region
    from moe_offload.patch.module_core import original_code

    region = torch.compile(make_region(original_code("grouped_mm")), backend="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="passes have not seen"):
        region(experts, x, ids, weights)
    with pytest.raises(RuntimeError, match="passes have not seen"):
        ops.mark_unserved(ids, "")
    model.moe_offload.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_that_was_forked_in_a_forward_is_refused_at_once(tmp_path):
    model = offloaded(layers=2)
    say(model, n=2)
    handle, runtime = model.moe_offload, model.moe_offload._runtime
    held, done = threading.Event(), threading.Event()

    def hold():
        with runtime.lock:
            held.set()
            done.wait(120)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(120)
    ways = {
        "call": lambda: model(IDS),
        "generate": lambda: say(model),
        "part": lambda: model.model(IDS),
        "save": lambda: model.save_pretrained(tmp_path / "saved"),
        "state": model.state_dict,
        "trace": handle.start_trace,
        "timeline": handle.start_timeline,
    }
    child = os.fork()
    if child == 0:
        failed = 0
        for way in ways.values():
            try:
                way()
                failed += 1
            except OffloadError as error:
                failed += not isinstance(error, ClosedError) or "forked" not in str(error)
            except BaseException:
                failed += 1
        try:
            str(handle), handle.stats(), handle.profile(), handle.close()
        except BaseException:
            failed += 1
        os._exit(failed)
    done.set()
    thread.join()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(say(model, n=2))
    model.moe_offload.close()


def test_models_are_loaded_by_several_threads_at_once():
    """While transformers makes a model, torch's default dtype is that model's, in every thread."""
    want = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")(IDS).logits

    def load(_):
        model = moe_offload.from_pretrained(MODEL, "6MB", config={"profile": "off"})
        same = torch.equal(model(IDS).logits, want)
        model.moe_offload.close()
        return same

    assert call_from(4, [load]) == [True] * 4
