"""A request on the clock: what is waited for, and what counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_offload.apps.bench.request import ask_model
from moe_offload.apps.bench.workload import count_steps, token_s


class Counting:
    """Stands for a model: `generate` as transformers has it, one call of the processors for each token."""

    def __init__(self) -> None:
        self.steps, self.options, self.followed = 0, {}, []

    def generate(self, input_ids, *, max_new_tokens, logits_processor, **options):
        self.options = options
        for token in range(max_new_tokens):
            self.steps += 1
            scores = logits_processor(input_ids, torch.eye(16)[None, token])
            self.followed.append(int(scores.argmax()))
        return input_ids


@pytest.mark.parametrize(("left_out", "waits"), [(0, [0, 1, 9]), (3, [0, 1, 4, 9])])
def test_the_device_is_waited_for_where_a_phase_ends_and_nowhere_else(left_out, waits):
    model, waited = Counting(), []
    mark = lambda: {"steps": model.steps}  # noqa: E731
    settle = lambda: waited.append(model.steps)  # noqa: E731
    answer = ask_model(model, [5, 6], 8, mark, settle=settle, left_out=left_out, cache_implementation="static")
    assert waited == waits
    assert answer.tokens == list(range(9))
    assert answer.prefill == {"steps": 1} and answer.decode == {"steps": 8 - left_out}
    assert model.options["cache_implementation"] == "static" and model.options["do_sample"] is False


def test_a_tokens_time_is_of_those_that_count():
    answer = {"decode_s": 10.0, "tokens": list(range(26)), "left_out": 5}
    assert count_steps(answer) == 20 and token_s(answer) == 0.5


def test_the_time_of_looking_at_counters_does_not_count(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("moe_offload.apps.bench.request.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))

    def slow() -> dict[str, float]:
        for _ in range(10):
            next(clock)
        return {}

    answer = ask_model(Counting(), [1], 4, slow)
    assert answer.ttft_s == 1.0 and answer.decode_s == 6.0  # a tick for each of the calls in between, and no more
    assert answer.steps_s == [2.0, 1.0, 1.0, 1.0]


def test_what_is_forced_is_followed_and_the_own_choices_are_answered():
    model = Counting()
    answer = ask_model(model, [5, 6], 3, forced=[9, 8, 7, 6])
    assert model.followed == [9, 8, 7, 6] and answer.tokens == [0, 1, 2, 3]
