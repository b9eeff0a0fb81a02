"""A server that computes requests together: each is answered as if it were alone, and streams as it did."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("greenlet")

import openai

from moe_offload.apps.serving import server as server_module
from moe_offload.errors import ServeError
from moe_offload.observe.profile import Profile

from .conftest import NAME, started, wait_until

PROMPTS = ["Il comando", "The ls command lists", "Das ist ein", "x"]
TOKENS = [24, 9, 40, 17]


@pytest.fixture(scope="module")
def together():
    with started(parallel=4, longest_queue=1) as found:
        yield found


def client_of(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)


def ask(served, i: int, **options) -> str:
    settings = {"model": NAME, "prompt": PROMPTS[i], "max_tokens": TOKENS[i], "temperature": 0, **options}
    return client_of(served).completions.create(**settings).choices[0].text


def at_once(*works):
    """What each returns, or its error; all of them run at once."""
    found = [None] * len(works)

    def run(i, work):
        try:
            found[i] = work()
        except openai.APIError as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i, work)) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    return found


def all_of(served, **options):
    return at_once(*[lambda i=i: ask(served, i, **options) for i in range(4)])


def test_each_is_answered_as_if_alone(together, plain, slow) -> None:
    want = [plain.say(text, n) for text, n in zip(PROMPTS, TOKENS, strict=True)]
    assert all_of(together) == want


def test_and_so_is_who_samples_from_a_seed(together, slow) -> None:
    options = {"temperature": 1.0, "seed": 5, "n": 2}
    want = [ask(together, i, **options) for i in range(4)]
    assert all_of(together, **options) == want


def test_they_stream_side_by_side(together, plain, slow) -> None:
    """Each has its first words before any of them is done."""
    options = {"model": NAME, "max_tokens": 60, "temperature": 0, "stream": True}
    streams = [client_of(together).completions.create(prompt=text, **options) for text in PROMPTS]
    said = [next(iter(stream)).choices[0].text for stream in streams]
    assert len(together.app.queue.running) == 4
    said = [first + "".join(one.choices[0].text for one in stream) for first, stream in zip(said, streams, strict=True)]
    assert said == [plain.say(text, 60) for text in PROMPTS]


def test_who_leaves_makes_room_and_one_more_than_may_wait_is_told(together, plain, slow) -> None:
    options = {"model": NAME, "max_tokens": 900, "temperature": 0, "stream": True}
    streams = [client_of(together).completions.create(prompt=text, **options) for text in PROMPTS]
    said = [next(iter(stream)).choices[0].text for stream in streams]
    queue = together.app.queue
    assert len(queue.running) == 4
    answer: list[str] = []
    waiting = threading.Thread(target=lambda: answer.append(ask(together, 1)))
    waiting.start()
    wait_until(lambda: len(queue) == 1)
    with pytest.raises(openai.RateLimitError, match="1 requests wait already"):
        ask(together, 0)
    for stream in streams[1:]:
        stream.close()
    waiting.join(240)
    assert answer == [plain.say(PROMPTS[1], TOKENS[1])]
    wait_until(lambda: len(queue.running) == 1)
    first = next(iter(streams[0])).choices[0].text
    assert plain.say(PROMPTS[0], 40).startswith(said[0] + first)
    streams[0].close()
    wait_until(lambda: not queue.running)


def test_an_error_in_one_is_told_to_that_one(together, plain, slow, monkeypatch) -> None:
    from moe_offload.apps.serving import generation

    real, failing = generation._Answer.is_done, plain.tokenizer(PROMPTS[2])["input_ids"]

    def is_done(self, ids, scores, **more):
        if ids[0, : len(failing)].tolist() == failing and ids.shape[1] > len(failing) + 4:
            raise RuntimeError("this one")
        return real(self, ids, scores, **more)

    monkeypatch.setattr(generation._Answer, "is_done", is_done)
    found = all_of(together)
    assert isinstance(found[2], openai.InternalServerError) and found[2].code == "RuntimeError"
    want = [plain.say(text, n) for text, n in zip(PROMPTS, TOKENS, strict=True)]
    assert [found[0], found[1], found[3]] == [want[0], want[1], want[3]]


def test_a_server_that_stops_tells_all_that_run(slow, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 0.2)
    with started(parallel=3) as served:
        options = {"model": NAME, "max_tokens": 1900, "temperature": 0, "stream": True}
        streams = [client_of(served).completions.create(prompt=text, **options) for text in PROMPTS[:3]]
        for stream in streams:
            next(iter(stream))
        served.server.stop()
        for stream in streams:
            with pytest.raises(openai.APIError, match="server is stopping"):
                list(stream)
        assert served.app.queue.join(120)


def test_usage_is_counted_for_the_name_of_each(tmp_path, monkeypatch, plain, slow) -> None:
    monkeypatch.setattr("moe_offload.plan.prepare.usage_folder", lambda: tmp_path)
    with started(parallel=4) as served:
        names = [NAME, f"{NAME}:italian", f"{NAME}:italian", f"{NAME}:manual"]
        works = [lambda i=i, name=name: ask(served, i, model=name) for i, name in enumerate(names)]
        assert at_once(*works) == [plain.say(text, n) for text, n in zip(PROMPTS, TOKENS, strict=True)]
    tokens = {path.stem: Profile.load(path).tokens for path in tmp_path.glob("*/*.json")}
    each = [len(plain.tokenizer(text)["input_ids"]) + n - 1 for text, n in zip(PROMPTS, TOKENS, strict=True)]
    assert tokens == {"default": each[0], "italian": each[1] + each[2], "manual": each[3]}


def test_a_prompt_cache_serves_one_at_a_time() -> None:
    with pytest.raises(ServeError, match="--prompt-cache"), started(keep=True, parallel=2):
        pass
