"""What openai's own client expects of a server, completions and chat, at once and streamed, sync and async."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("openai")

import openai
import torch

from .conftest import NAME, started

TEXT = "Il comando ls elenca"
MESSAGES = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def complete(client, **options):
    return client.completions.create(**{"model": NAME, "prompt": TEXT, "max_tokens": 8, "temperature": 0, **options})


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": NAME, "messages": MESSAGES, "max_tokens": 8, "temperature": 0, **options}
    )


def joined(stream) -> str:
    """The text of a stream of either API."""
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    return "".join(c.delta.content or "" if hasattr(c, "delta") else c.text for c in choices)


def test_the_model_is_listed_and_found(client) -> None:
    assert [model.id for model in client.models.list()] == [NAME] == [client.models.retrieve(NAME).id]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("somebody/else")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_completion(client, plain) -> None:
    answer = complete(client)
    assert (answer.object, answer.model, answer.choices[0].text) == ("text_completion", NAME, plain.say(TEXT))
    assert answer.choices[0].finish_reason == "length"
    tokens = len(plain.tokenizer(TEXT)["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        tokens,
        8,
        tokens + 8,
    )


def test_a_chat_of_a_base_model_continues_the_messages(client, plain) -> None:
    messages = [{"role": "system", "content": "Pagina di manuale"}, *MESSAGES]
    answer = chat(client, messages=messages)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == plain.say(f"Pagina di manuale\n{TEXT}")
    assert joined(chat(client, messages=messages, stream=True)) == answer.choices[0].message.content


def test_its_own_chat_template_is_kept(plain) -> None:
    plain.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<{{ mark }}>"
    with started(plain.tokenizer) as served:
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)
        extra = {"chat_template_kwargs": {"mark": "ls"}}
        answer = chat(client, messages=[{"role": "developer", "content": "a"}, *MESSAGES], extra_body=extra)
    plain.tokenizer.chat_template = None
    assert answer.choices[0].message.content == plain.say(f"<system>a<user>{TEXT}<ls>")


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_says_the_same_in_events_that_end(client, ask, plain) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == plain.say(TEXT)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    assert not any(chunk.usage for chunk in ask(client, stream=True))


def test_every_stream_ends_with_done(client) -> None:
    with client.completions.with_streaming_response.create(
        model=NAME, prompt=TEXT, max_tokens=2, stream=True
    ) as answer:
        assert list(answer.iter_lines())[-2] == "data: [DONE]"


def test_several_clients_at_once_each_get_their_own_answer(client, plain) -> None:
    other = "ls はディレクトリ"
    asked = [
        (complete, {"prompt": TEXT}),
        (complete, {"prompt": other, "stream": True}),
        (chat, {}),
        (chat, {"stream": True}),
    ]

    def ask(one) -> str:
        answer = one[0](client, **one[1])
        if "stream" in one[1]:
            return joined(answer)
        return answer.choices[0].text if one[0] is complete else answer.choices[0].message.content

    with ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(ask, asked * 3))
    assert answers == [plain.say(TEXT), plain.say(other), plain.say(TEXT), plain.say(TEXT)] * 3


def test_the_async_client(served, plain) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120) as client:
            options = {"model": NAME, "max_tokens": 8, "temperature": 0}
            stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **options)
            answer = await client.completions.create(prompt=TEXT, **options)
            return "".join([c.choices[0].delta.content or "" async for c in stream]), answer.choices[0].text

    assert asyncio.run(both()) == (plain.say(TEXT), plain.say(TEXT))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [complete, chat])
def test_stop_strings_are_not_in_the_text_nor_what_follows(client, ask, stream, plain) -> None:
    """Each of all strings that are in the answer: inside a token, at its edges, and over several."""
    whole = plain.say(TEXT)
    for begin in range(0, len(whole), 2):
        for length in (1, 2, 5):
            stop = whole[begin : begin + length]
            answer = ask(client, stop=[stop, "never"], stream=stream)
            if stream:
                chunks = list(answer)
                text, reason = joined(chunks), chunks[-1].choices[0].finish_reason
            else:
                choice = answer.choices[0]
                text, reason = (choice.text if ask is complete else choice.message.content), choice.finish_reason
            assert (text, reason) == (whole[: whole.index(stop)], "stop"), stop


def test_the_end_of_the_text_is_a_stop_and_not_text(client, plain) -> None:
    eos = plain.tokenizer.eos_token_id
    answer = complete(client, logit_bias={str(eos): 100})
    assert (answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("", "stop", 1)


def test_choices_prompts_and_echo(client, plain) -> None:
    ids = plain.tokenizer("a b")["input_ids"]
    answer = complete(client, prompt=[TEXT, "a b"], n=2, echo=True)
    want = [TEXT + plain.say(TEXT)] * 2 + ["a b" + plain.say("a b")] * 2
    assert [choice.text for choice in answer.choices] == want
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len(plain.tokenizer(TEXT)["input_ids"]) + len(ids)
    assert answer.usage.completion_tokens == 32
    assert complete(client, prompt=ids).choices[0].text == complete(client, prompt=[ids]).choices[0].text
    streamed: dict[int, str] = {}
    for chunk in complete(client, prompt=[TEXT, "a b"], echo=True, stream=True):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert streamed == {0: want[0], 1: want[2]}
    assert [c.message.content for c in chat(client, n=2).choices] == [plain.say(TEXT)] * 2


def test_sampling_is_that_of_generate_and_its_seed_begins_it_anew(client, plain) -> None:
    sampled = [complete(client, temperature=1.5, top_p=0.9, seed=seed).choices[0].text for seed in (7, 7, 8)]
    inputs = plain.tokenizer(TEXT, return_tensors="pt")
    for seed, text in zip((7, 7, 8), sampled, strict=True):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 8}
        out = plain.model.generate(**inputs, **options)
        assert text == plain.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sampled[0] != sampled[2]
    pair = complete(client, temperature=1.5, top_p=0.9, seed=7, n=2).choices
    assert [choice.text for choice in pair] == [sampled[0], sampled[2]]
    assert complete(client, temperature=1.5, extra_body={"top_k": 1}).choices[0].text == plain.say(TEXT)


def test_a_request_that_says_nothing_about_sampling_is_answered_as_generate_would(client, plain) -> None:
    assert complete(client, temperature=None).choices[0].text == plain.say(TEXT)
    assert complete(client, max_tokens=None).choices[0].text == plain.say(TEXT, 16)


def test_log_probabilities_are_those_of_the_plain_model(client, plain) -> None:
    """Bit for bit, and of the model: what the request adds to the logits is not in them."""
    found = complete(client, logprobs=3, logit_bias={"5": 1.0}).choices[0].logprobs
    prompt = plain.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = plain.model.generate(prompt, max_new_tokens=8, **options)
    ids = out.sequences[0, prompt.shape[1] :].tolist()
    steps = [torch.log_softmax(logits[0].float(), -1) for logits in out.logits]
    assert found.token_logprobs == [float(step[id]) for step, id in zip(steps, ids, strict=True)]
    assert found.tokens == [plain.tokenizer.decode([id]) for id in ids]
    assert [max(top.values()) for top in found.top_logprobs] == [float(step.max()) for step in steps]
    assert all(len(top) == 3 for top in found.top_logprobs)
    assert [plain.say(TEXT)[at:].startswith(token) for at, token in zip(found.text_offset, found.tokens, strict=True)]
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.logprob for entry in content] == found.token_logprobs
    assert content[0].bytes == list(content[0].token.encode()) and len(content[0].top_logprobs) == 2
    streamed = [c.choices[0].logprobs for c in chat(client, logprobs=True, stream=True)]
    assert [e.logprob for part in streamed if part for e in part.content] == found.token_logprobs


def test_log_probabilities_end_where_a_stop_string_cut(client, plain) -> None:
    whole = plain.say(TEXT)
    choice = complete(client, logprobs=0, stop=whole[4:6]).choices[0]
    assert choice.text == whole[:4] and "".join(choice.logprobs.tokens).startswith(choice.text)
    assert all(offset < 4 for offset in choice.logprobs.text_offset)


def test_penalties_forbid_what_was_said(client, plain) -> None:
    said = complete(client, presence_penalty=2, frequency_penalty=2, max_tokens=24, logprobs=0).choices[0].logprobs
    free = complete(client, max_tokens=24, logprobs=0).choices[0].logprobs
    assert len(set(said.tokens)) > len(set(free.tokens))


REFUSED = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e-9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"prompt": ["a"] * 100, "n": 2}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
    ({"extra_body": {"generation_config": "{}"}}, "generation_config"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [4096]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": "ls " * 3000}, "prompt"),
    ({"prompt": [1] * 2048}, "prompt"),
]
REFUSED_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ask", "options", "param"),
    [(complete, *one) for one in REFUSED] + [(chat, *one) for one in REFUSED_CHATS],
)
def test_what_is_not_done_is_refused_by_name(client, ask, options, param) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert param.partition("[")[0] in caught.value.message and len(caught.value.message) < 700


@pytest.mark.parametrize(
    "options",
    [
        {"suffix": ""},
        {"best_of": 1},
        {"n": 2, "best_of": 2},
        {"user": "me"},
        {"stop": []},
        {"extra_body": {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}},
    ],
)
def test_what_asks_for_nothing_is_accepted(client, options, plain) -> None:
    assert complete(client, **options).choices[0].text == plain.say(TEXT)


def test_another_model_is_not_found(client) -> None:
    for ask in (complete, chat):
        with pytest.raises(openai.NotFoundError, match=NAME) as caught:
            ask(client, model="gpt-4")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("ask", "long"),
    [(complete, {"prompt": "ls " * 3000}), (chat, {"messages": [{"role": "user", "content": "ls " * 3000}]})],
)
def test_a_stream_that_cannot_begin_has_a_status(client, ask, long) -> None:
    with pytest.raises(openai.BadRequestError, match="context takes 2048") as caught:
        ask(client, stream=True, **long)
    assert caught.value.code == "context_length_exceeded"
