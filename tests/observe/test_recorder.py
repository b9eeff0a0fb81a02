"""A trace of a run, replayed, gives the run's own counters; what is kept is bounded, and what is not there is said."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moe_offload import Trace, TraceError, optimize
from moe_offload.apps.cli import app
from moe_offload.apps.families.tiny import build
from moe_offload.apps.simulate import fast, plain
from moe_offload.apps.simulate.stream import per_layer
from moe_offload.cache import POLICIES
from moe_offload.cache.layer_cache import LayerCache
from moe_offload.observe.trace.recorder import TraceRecorder
from tests.paths import MODEL

POLICY = ["successors", "decayed_lfu", "lru"]


def offloaded(family, policy, implementation, slots):
    model = build(family)
    layers = model.config.get_text_config().num_hidden_layers
    config = {"policy": policy, "experts_implementation": implementation, "kv_tokens": 64, "reserve": "1MB"}
    optimize(model, "200MB", device_map="cpu", config=config)
    for layer in model.moe_offload._runtime.layers:  # so few that prompts and batches do not fit
        layer.arrivals.cache = LayerCache(
            layer.cache.num_experts, slots, POLICIES[policy](layer.cache.num_experts, 32.0), layer.cache.name
        )
    assert layers
    return model


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("policy", POLICY)
def test_replay_gives_the_counters_of_the_run(policy, implementation):
    """Prompts of several lengths, a batch, decoding: hits, misses, bytes and tokens of every layer, to the last one."""
    model = offloaded("qwen3_moe", policy, implementation, slots=3)
    handle = model.moe_offload
    handle.start_trace()
    for seed, batch, prompt in [(0, 1, 9), (1, 1, 2), (2, 3, 5), (3, 1, 12)]:
        ids = torch.randint(3, 90, (batch, prompt), generator=torch.Generator().manual_seed(seed))
        model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    trace = handle.trace()
    assert trace.meta["model_type"] == "qwen3_moe" and len(trace.request_start) == 4
    for stream, layer in zip(per_layer(trace), handle._runtime.layers, strict=True):
        cache, ran = layer.cache, layer.cache.counters
        row_bytes = layer.moe.layout.row_bytes
        again = LayerCache(cache.num_experts, cache.slots, POLICIES[policy](cache.num_experts, 32.0))
        hits = plain.replay_events(stream.events(), again, ran.bytes_read // ran.misses)
        assert ran.bytes_read % ran.misses == 0 and ran.bytes_read // ran.misses >= row_bytes - 4096
        assert ran.hits > 0 and ran.misses > ran.streamed > 0, "nothing that could differ has happened"
        for name in ("hits", "misses", "bytes_read", "events", "tokens"):
            assert getattr(again.counters, name) == getattr(ran, name), name
        assert again.expert_at == cache.expert_at
        assert fast.replay_fast(stream, cache.slots, policy, 32.0)[1].tolist() == hits.tolist()
    steps = handle.forwards()
    stats = handle.stats()
    assert [sum(getattr(step, name) for step in steps) for name in ("hits", "misses", "bytes_read")] == [
        stats.hits, stats.misses, stats.bytes_read
    ]  # fmt: skip
    assert [step.tokens for step in steps[:3]] == [9, 1, 1] and steps[0].began_s < steps[1].began_s
    assert [step.decode for step in steps] == ([False] + [True] * 11) * 4, "in a batch, too"
    times = [at_s for step in steps for at_s in (step.began_s, step.ended_s)]
    assert times == sorted(times) and all(0 <= step.compile_s <= step.ended_s - step.began_s for step in steps)
    assert steps[0].compile_s > 0 == steps[5].compile_s


def recorder(experts=4, layers=2, top_k=2, **kwargs):
    return TraceRecorder(
        [LayerCache(experts, 2, POLICIES["lru"](experts, 1.0)) for _ in range(layers)], [top_k] * layers, **kwargs
    )


def test_rows_are_the_tokens_where_the_graph_knows_them():
    run = recorder(layers=1)
    run.event(0, [3, 0, 0, 1], 2)
    run.event(0, [2, 1], 1)
    trace = run.trace({"a": "b"})
    assert trace.experts_TLK[:, 0].tolist() == [[3, 0], [0, 1], [2, 1]] and trace.meta["a"] == "b"
    assert trace.event_start.tolist() == [0, 2] and trace.request_start.tolist() == [0]


def test_pairs_sorted_by_expert_are_dealt_out():
    run = recorder(layers=1)
    run.event(0, [0, 0, 0, 1, 2, 3], 3)
    rows = run.trace().experts_TLK[:, 0]
    assert sorted(rows.ravel().tolist()) == [0, 0, 0, 1, 2, 3] and all(len(set(row)) == 2 for row in rows.tolist())


def test_a_layer_that_is_not_asked_and_a_prompt_after_decoding():
    run = recorder()
    for layer, ids, tokens in [(0, [0, 1], 1), (1, [2, 3], 1), (0, [1, 2], 1), (0, [0, 1, 1, 2], 2), (1, [0, 1], 1)]:
        run.event(layer, ids, tokens)
    trace = run.trace()
    assert trace.event_start.tolist() == [0, 1, 2] and trace.request_start.tolist() == [0, 2]
    assert trace.experts_TLK[1].tolist() == [[1, 2], [-1, -1]] and trace.experts_TLK[3, 1].tolist() == [-1, -1]


def test_a_full_trace_keeps_whole_forwards(caplog):
    run = recorder(max_bytes=20)  # 4 bytes an event
    with caplog.at_level(logging.WARNING, "moe_offload"):
        for _ in range(10):
            run.event(0, [0, 1], 1)
            run.event(1, [0, 1], 1)
    assert run.trace().tokens == 2 == len(run.forwards()) and len(caplog.records) == 1
    assert (run.trace().experts_TLK >= 0).all()
    assert run.passed_s() == run.marks[2][0] > 0, "the clock stops with the trace"


def test_a_forward_that_fails_before_its_first_event_is_none():
    run = recorder(layers=1)
    run.begin_forward(decode=False)
    run.end_forward()
    run.begin_forward(decode=True)
    run.event(0, [0, 1, 2, 3], 2)  # a batch of two
    run.end_forward()
    run.begin_forward(decode=False)
    run.event(0, [0, 1], 1)  # a prompt of one token, or the rest of one in pieces
    (first, second) = run.forwards()
    assert (first.decode, first.tokens, second.decode, second.tokens) == (True, 2, False, 1)
    assert first.began_s <= first.ended_s <= second.began_s <= second.ended_s
    assert run.trace().request_start.tolist() == [0, 2], "a prompt of one token is a request of its own"


def test_a_prompt_of_one_token_is_no_decoding():
    """By the KV cache: empty before the prompt. Batches, static caches and calls without a cache as well."""
    model = optimize(build("qwen3_moe"), "200MB", device_map="cpu")
    model.moe_offload.start_trace()
    ids = torch.tensor([[5], [6]])
    model.generate(ids, max_new_tokens=3, do_sample=False)
    model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
    model(ids)
    forwards = model.moe_offload.forwards()
    assert [forward.decode for forward in forwards] == [False, True, True] * 2 + [False]
    assert model.moe_offload.trace().request_start.tolist() == [0, 6, 12]


def test_nothing_recorded():
    with pytest.raises(TraceError, match="nothing has been recorded"):
        recorder().trace()
    model = build("qwen3_moe")
    optimize(model, "200MB", device_map="cpu")
    with pytest.raises(TraceError, match="start_trace"):
        model.moe_offload.trace()


def test_trace_out(tmp_path):
    out = tmp_path / "run.npz"
    arguments = ["run", str(MODEL), "--budget", "6MB", "--prompt", "ls", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, [*arguments, "--save-trace", str(out)])
    assert result.exit_code == 0, result.output
    trace = Trace.load(out)
    assert trace.tokens >= 4 and np.isin(trace.experts_TLK, range(-1, max(trace.num_experts))).all()
    result = CliRunner().invoke(app, [*arguments, "--save-trace", str(tmp_path / "no" / "run.npz")])
    assert result.exit_code == 2 and "--save-trace" in result.output and "does not exist" in result.output
