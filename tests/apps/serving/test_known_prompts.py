"""A request that begins as an earlier one did: the same answer, and less to read."""

from __future__ import annotations

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai

from .conftest import NAME, started

LONG = "Il comando ls elenca i file di una directory, e il comando cp ne copia uno in un altro. Il comando"


def test_the_second_request_is_told_how_much_was_known(plain):
    with started(keep=True) as served:
        served.app.warm_up()
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)

        def ask(prompt, **options):
            return client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0, **options)

        first, second, other = ask(LONG), ask(LONG + " mv"), ask("The ls command")
        prompt_tokens = len(plain.tokenizer(LONG)["input_ids"])
        cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second, other)]
        assert cached[0] == cached[2] == 0 < cached[1] <= prompt_tokens
        assert first.choices[0].text == plain.say(LONG) and second.choices[0].text == plain.say(LONG + " mv")
        again = ask(LONG, n=2)
        assert {choice.text for choice in again.choices} == {plain.say(LONG)}
        assert again.usage.prompt_tokens_details.cached_tokens == prompt_tokens - 1
        *_, last = ask(LONG, stream=True, stream_options={"include_usage": True})
        assert last.usage.prompt_tokens_details.cached_tokens == prompt_tokens - 1


def test_penalties_and_probabilities_are_of_the_whole_text(served):
    """What a request adds to `generate` sees all tokens, also those that were not read again."""
    asked = {"model": NAME, "prompt": LONG, "max_tokens": 8, "temperature": 0, "logprobs": 3, "presence_penalty": 1.5}
    with started(keep=True) as keeping:
        clients = [openai.OpenAI(base_url=one.url, api_key="none", max_retries=0) for one in (served, keeping, keeping)]
        choices = [client.completions.create(**asked).choices[0] for client in clients]
    assert len({choice.text for choice in choices}) == 1
    whole, _, rest = (choice.logprobs.token_logprobs for choice in choices)
    assert rest == pytest.approx(whole, abs=0.1)  # in bfloat16
