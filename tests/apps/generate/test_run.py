"""moe-offload run: the text as it comes is the text of plain transformers; what cannot work ends early."""

from __future__ import annotations

import json
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.generate import run as command
from moe_offload.apps.generate.prompt import encode_chat, room_for_answer
from moe_offload.apps.generate.speed import speed_line
from moe_offload.apps.generate.streaming import Streamer
from moe_offload.cache.counters import Stats
from moe_offload.errors import ConfigError, OffloadError
from tests.paths import MODEL_NAME as MODEL

TOKEN_BYTES = 2 * 4 * 2 * 32 * 2  # of its KV cache: keys and values, layers, heads, their width, bfloat16


def run(*arguments: str, **how):
    return CliRunner().invoke(app, ["run", MODEL, "--budget", "6MB", *arguments], **how)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads one now has not looked at the prompt first."""
    monkeypatch.setattr("moe_offload.api.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))


class Ticks:
    """A clock that ticks at each look, of a run that compiled for a second and a half."""

    compiling_s = 1.5

    def __init__(self) -> None:
        self._ticks = count()

    def __call__(self) -> float:
        return float(next(self._ticks))


def streamed(tokenizer, ids: list[int], prompt: int, **how) -> tuple[list[str], Streamer]:
    parts: list[str] = []
    streamer = Streamer(tokenizer, parts.append, Ticks(), **how)
    streamer.put(torch.tensor([ids[:prompt]]))
    for one in ids[prompt:]:
        streamer.put(torch.tensor([one]))
    streamer.end()
    return parts, streamer


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 2000), min_size=1, max_size=40), prompt=st.integers(1, 40))
def test_the_parts_add_up_to_the_text(ids, prompt):
    """Of any tokens: half characters, special tokens, and what is no UTF-8 at all."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [one % len(tokenizer) for one in ids]
    parts, streamer = streamed(tokenizer, ids, min(prompt, len(ids)))
    assert "".join(parts) == streamer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_is_written_whole_and_a_word_at_once(tokenizer):
    text = "日本語の manuale è 🙂 fine"
    ids = tokenizer(text)["input_ids"]
    parts, streamer = streamed(tokenizer, ids, 1)
    assert len(parts) > 5 and not any("\ufffd" in part for part in parts)
    assert (streamer.prompt_tokens, streamer.new_tokens) == (1, len(ids) - 1)
    parts, _ = streamed(tokenizer, ids, len(ids) - 2, skip_prompt=True)
    assert text.endswith("".join(parts)) and len("".join(parts)) < len(text)


def test_text_waits_until_both_graphs_are_compiled(tokenizer):
    """A bar begins its line anew: what stands there already would be overwritten."""
    parts: list[str] = []
    streamer = Streamer(tokenizer, parts.append, Ticks())
    ids = tokenizer("ls lists all files")["input_ids"]
    for one in (ids[:2], ids[2:3]):  # the prompt is there before its graph is, the first token before that of decoding
        streamer.put(torch.tensor([one]))
        assert not parts
    streamer.put(torch.tensor([ids[3]]))
    assert "".join(parts) == tokenizer.decode(ids[:4])


def test_the_line_about_speed(tokenizer):
    _, streamer = streamed(tokenizer, tokenizer("ls lists files")["input_ids"], 2)
    facts = {"hits": 3, "misses": 1, "bytes_read": 6000, "tokens": 3}
    none = SimpleNamespace(**dict.fromkeys(facts, 0))
    line = speed_line(streamer, none, SimpleNamespace(**facts))
    assert "prompt 2 tokens, 2.0 tokens/s" in line and "time to first token 1.00 s" in line
    assert f"generated {streamer.new_tokens} tokens, 1.0 tokens/s" in line
    assert "hit rate 75.0%" in line and "2.00 KB read per token" in line
    assert "compiling 1.5 s beside that" in line and "peak memory" in line
    assert set(facts) <= set(Stats.__dataclass_fields__), "these are counters"


def test_sampled_text_is_that_of_plain_transformers(tokenizer):
    asked = ["--prompt", "Il comando", "--max-new-tokens", "8"]
    flags = ["--temperature", "0.9", "--top-p", "0.95", "--top-k", "20", "--seed", "7", "--threads", "1"]
    result = run(*asked, *flags, "--dtype", "float32", "--budget", "16MB")
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    set_seed(7)
    how = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 20, "max_new_tokens": 8}
    tokens = plain.generate(**tokenizer("Il comando", return_tensors="pt"), **how)[0]
    assert (result.exit_code, result.stdout) == (0, tokenizer.decode(tokens) + "\n"), result.output
    last = result.stderr.strip().splitlines()[-1]
    assert "prompt 4 tokens" in last and "generated 8 tokens" in last and "hit rate" in last


def test_ctrl_c_keeps_the_text(monkeypatch, tmp_path):
    def interrupted(streamer, model, inputs, how):
        streamer.put(inputs["input_ids"])
        streamer.put(inputs["input_ids"][0, 0])
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate_into", interrupted)
    saved = tmp_path / "p.json"
    result = run("--prompt", "ls lists", "--save-profile", str(saved))
    assert result.exit_code == 130 and result.stdout.startswith("ls lists") and result.stdout.endswith("\n")
    assert "moe-offload: interrupted" in result.stderr and "generated 1 tokens" in result.stderr
    assert saved.is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--prompt", ""], 2, "the prompt is empty"),
        (["--prompt", "a", "--file", "x"], 2, "either --prompt or --file"),
        (["--file", "nowhere.txt"], 2, "--file nowhere.txt: it cannot be read (No such file"),
        (["--file", MODEL], 2, "it cannot be read (Is a directory"),
        (["--prompt", "a \udcff"], 2, "--prompt: it is not UTF-8 text"),
        (["--prompt", "-"], 2, "standard input: it is not UTF-8 text"),
        (["--prompt", "ls " * 3000], 2, "the model takes 2048 at most"),
        (["--chat"], 5, "no chat template"),
        (["--system", "Be brief"], 5, "no chat template"),
        (["--temperature", "nan"], 2, "it takes a number from 0 to 100"),
        (["--top-p", "0"], 2, "it takes a number from"),
        (["--top-k", "-1"], 2, "it takes a whole number from 0 on"),
        (["--seed", "x"], 2, "it takes a whole number from 0"),
        (["--threads", "0"], 2, "it takes a whole number from 1"),
        (["--dtype", "float8"], 2, "it takes auto, float32"),
        (["--attn-implementation", "fast"], 2, "it takes eager, sdpa"),
        (["--prefill-chunk-size", "0"], 2, "it takes a whole number from 1 on"),
    ],
)
def test_what_cannot_work_is_one_line_before_the_model_is_loaded(no_model, arguments, code, says):
    result = run(*arguments, input=b"\xff\xfe ls")
    assert result.exit_code == code and says in " ".join(result.stderr.split()) and result.stdout == "", result.output


def test_no_more_is_generated_than_the_context_has_room_for(monkeypatch):
    def stop(*_, **how):
        raise OffloadError(f"room for {how['config'].kv_tokens}")

    monkeypatch.setattr("moe_offload.api.from_pretrained", stop)
    result = run("--prompt", "ls", "--max-new-tokens", "5000")
    first, last = result.stderr.strip().splitlines()
    assert "tokens are generated at most" in first and "room for 2048" in last, "the KV cache has room for all of it"
    result = run("--prompt", "ls", "--context", "64", "--max-new-tokens", "99")
    assert "tokens are generated at most: the context ends there" in result.stderr
    assert "room for 64" in result.stderr and result.exit_code == 1, "what was said counts"


def test_a_given_context_bounds_prompt_and_answer(no_model, monkeypatch):
    """Room for it is kept in the budget: what is longer would not stay inside."""
    result = run("--prompt", "ls " * 100, "--context", "16")
    assert (
        result.exit_code == 2
        and "the budget has room for 16 with its answer" in result.stderr
        and "--context" in result.stderr
    )
    monkeypatch.setenv("MOE_OFFLOAD_KV_TOKENS", "16")
    assert "the budget has room for 16 with its answer" in run("--prompt", "ls " * 100).stderr


def test_a_given_reserve_bounds_prompt_and_answer(monkeypatch):
    """The KV cache has so many bytes and no more, whatever the context."""
    monkeypatch.setenv("MOE_OFFLOAD_RESERVE", "102400")
    room = f"the budget has room for {102400 // TOKEN_BYTES} with its answer"
    result = run("--prompt", "ls " * 200)
    assert result.exit_code == 2 and room in result.stderr and "MOE_OFFLOAD_RESERVE" in result.stderr, result.stderr
    result = run("--prompt", "ls", "--max-new-tokens", "100")
    assert "tokens are generated at most: the context ends there" in result.stderr and result.exit_code == 0


def test_room_for_an_answer():
    assert room_for_answer(10, None, 99) == 99 and room_for_answer(10, 20, 99) == 10
    assert room_for_answer(10, None, 99, 15) == 5 and room_for_answer(10, 20, 99, 90) == 10
    with pytest.raises(ConfigError, match="20 tokens, and the model takes 20 at most"):
        room_for_answer(20, 20, 1)


def test_a_template_that_refuses_is_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(ConfigError, match="no system role"):
        encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "ls"}])["input_ids"]
    assert tokenizer.decode(ids[0]) == "[user]ls"


def test_plan_prints_json_when_it_does_not_fit():
    result = CliRunner().invoke(app, ["plan", MODEL, "--budget", "1MB", "--json"])
    facts = json.loads(result.stdout)
    assert result.exit_code == facts["error"]["exit_code"] == 3 and facts["fits"] is False
    assert 1_000_000 == facts["budget"] < facts["floor"] < facts["resident"]
    fits = json.loads(CliRunner().invoke(app, ["plan", MODEL, "--budget", str(facts["floor"]), "--json"]).stdout)
    assert fits["fits"] and set(facts) - {"error"} <= set(fits)
    other = CliRunner().invoke(app, ["plan", "./nowhere", "--json"])
    assert json.loads(other.stdout)["error"]["type"] == "CheckpointError" and other.exit_code == 4
