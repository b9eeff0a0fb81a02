"""moe-offload chat: turns, commands, Ctrl-C; the answers are those of plain transformers."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.generate import chat as command
from moe_offload.apps.generate.conversation import Conversation
from moe_offload.apps.generate.first_answer import FirstAnswer
from moe_offload.apps.options.groups import SamplingFlags
from moe_offload.cache.counters import Stats
from moe_offload.errors import ExpertReadError
from moe_offload.observe.profile import Profile
from tests.paths import MODEL_NAME as MODEL

TOKEN_BYTES = 2 * 4 * 2 * 32 * 2  # of its KV cache: keys and values, layers, heads, their width, bfloat16


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_a_conversation_from_a_pipe(tokenizer, tmp_path):
    saved, said = tmp_path / "chat.json", tmp_path / "said.json"
    flags = ["--budget", "6MB", "--max-new-tokens", "8", "--system", "Pagina di manuale", "--save-profile", str(saved)]
    lines = f"Il comando\n!status\n!save {said}\n!set temperature=0\nelenca\n!exit\nnever read\n"
    result = CliRunner().invoke(app, ["chat", MODEL, *flags], input=lines)
    assert result.exit_code == 0, result.output
    first, second = (text.strip() for text in answers(tokenizer, "Pagina di manuale", ["Il comando", "elenca"]))
    assert first in result.stdout and second in result.stdout and "never read" not in result.output
    assert json.loads(said.read_text())[0] == {"role": "user", "content": "Il comando"}
    assert "!clear" in result.stderr, "the commands are listed at the start"
    status = [line for line in result.stderr.splitlines() if line.startswith("[prompt")]
    assert len(status) == 2 and all("hit rate" in line and "budget 6.00 MB" in line for line in status)
    assert Profile.load(saved).tokens > 16


def test_today_and_tomorrow(tmp_path, monkeypatch):
    """What a start with memory gains over the one without is on the screen."""
    monkeypatch.setattr("moe_offload.plan.prepare.usage_folder", lambda: tmp_path)
    flags = ["--budget", "6MB", "--max-new-tokens", "4", "--profile", "italian"]
    today = CliRunner().invoke(app, ["chat", MODEL, *flags], input="Il comando ls elenca\ni file\n")
    assert today.exit_code == 0, today.output
    assert today.stderr.count("[this start remembered nothing: first token after") == 1, today.stderr
    tomorrow = CliRunner().invoke(app, ["chat", MODEL, *flags], input="Il comando cp copia\n")
    (line,) = [line for line in tomorrow.stderr.splitlines() if "this start remembered" in line]
    with_memory, without = line.split("; without memory, on ")
    assert re.match(r"\[this start remembered \d+ tokens: first token after ", with_memory), line
    cold = r"\d{4}-\d\d-\d\d: first token after .* read for it, 0\.0% of its experts were there\]"
    assert re.match(cold, without), line
    (path,) = tmp_path.glob("*/italian.json")
    assert Profile.load(path).tokens > 20


def test_what_the_prompt_cache_saves_is_not_credited_to_remembered_usage(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_offload.plan.prepare.usage_folder", lambda: tmp_path)
    flags = [
        "--budget",
        "6MB",
        "--max-new-tokens",
        "4",
        "--profile",
        "italian",
        "--prompt-cache",
        str(tmp_path / "kept"),
    ]
    flags += ["--system", "Il comando ls elenca i file di una directory, e il comando cp ne copia uno in un altro"]
    computed = []
    for line in ("Il comando mv", "Il comando rm"):
        result = CliRunner().invoke(app, ["chat", MODEL, *flags], input=line)
        assert result.exit_code == 0, result.output
        prompt, known = map(int, re.search(r"\[prompt (\d+) tokens(?: \((\d+) of)?", result.stderr).groups("0"))
        computed.append(prompt - known)
        assert f"({prompt - known} tokens of prompt computed)" in result.stderr, result.stderr
    assert computed[1] < computed[0] / 2


def test_what_was_said_yesterday_is_not_read_again(tokenizer, tmp_path):
    """With a folder: the system prompt of another process. Where nobody asks, it is read."""
    flags = ["--budget", "6MB", "--max-new-tokens", "4", "--profile", "off"]
    flags += ["--system", "Il comando ls elenca i file di una directory, e il comando cp ne copia uno in un altro"]
    told = {}
    for day, where in (("first", tmp_path / "kept"), ("second", tmp_path / "kept"), ("third", None)):
        asked = [*flags, *(["--prompt-cache", str(where)] if where else [])]
        result = CliRunner().invoke(app, ["chat", MODEL, *asked], input=f"Il comando mv\nIl comando {day}\n")
        assert result.exit_code == 0, result.output
        told[day] = [line for line in result.stderr.splitlines() if line.startswith("[prompt")]
        system, questions = flags[-1], ["Il comando mv", f"Il comando {day}"]
        for text in answers(tokenizer, system, questions, new_tokens=4):
            assert text.strip() in result.stdout
    first, second, off = ([int(n) for line in told[day] for n in re.findall(r"\((\d+) of", line)] for day in told)
    assert len(first) == 1 and len(second) == 2 and second[0] < second[1] and off == [], told


def test_figures_of_an_earlier_start_that_cannot_be_read_are_left_out():
    first = FirstAnswer(5, 0.5, 1000, 0.25, "2026-11-28")
    assert FirstAnswer.from_meta(first.meta()) == first
    assert FirstAnswer.from_meta({**first.meta(), "cold_read_bytes": "many"}) is None
    assert FirstAnswer.from_meta({}) is None


def answers(tokenizer, system: str, questions: list[str], new_tokens: int = 8) -> list[str]:
    """Of plain transformers, as a model without a chat template continues what was said."""
    model, said, found = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"), [system], []
    for question in questions:
        said.append(question)
        inputs = tokenizer("\n".join(said), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=new_tokens)[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(tokens, skip_special_tokens=True))
        said.append(found[-1])
    return found


@pytest.fixture
def talk(tokenizer):
    """A conversation with a model that says what it is told to: `talk.model.generate`."""
    plan = SimpleNamespace(budget_bytes=8_000_000)
    handle = SimpleNamespace(stats=Stats, plan=plan, remembered=None, usage_path=None)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    model = SimpleNamespace(moe_offload=handle, config=config)
    made = Conversation(model, tokenizer, SamplingFlags(), None)
    made.model = model
    return made


def test_ctrl_c_ends_the_answer_and_keeps_it(talk, capsys):
    def interrupted(*, input_ids, streamer, **_):
        streamer.put(input_ids)
        streamer.put(input_ids[0, :1])
        raise KeyboardInterrupt

    talk.model.generate = interrupted
    assert talk.take("ls lists")
    out, err = capsys.readouterr()
    assert out.startswith("ls") and "..." in out and "budget 8.00 MB" in err
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_an_error_ends_the_answer_and_unsays_the_question(talk, capsys):
    def unreadable(**_):
        raise ExpertReadError("disk gone")

    talk.model.generate = unreadable
    assert talk.take("ls") and talk.messages == []
    assert "disk gone" in capsys.readouterr().err


def test_a_conversation_that_is_too_long_says_what_to_do(talk, capsys):
    assert talk.take("ls " * 100) and talk.messages == []
    err = capsys.readouterr().err
    assert "the model takes 64 at most" in err and "!clear" in err


def test_a_conversation_beyond_the_given_context_says_what_to_do(talk, tokenizer, capsys):
    short = Conversation(talk.model, tokenizer, SamplingFlags(), None, context=16)
    assert short.take("ls " * 20) and short.messages == []
    err = capsys.readouterr().err
    assert "the budget has room for 16 with its answer" in err and "!clear" in err


def test_a_conversation_stays_within_what_the_plan_keeps_room_for(talk, tokenizer, capsys):
    """And the first answer that is cut short for it is told so, once."""
    asked = []
    talk.model.generate = lambda *, max_new_tokens, streamer, input_ids, **_: (
        asked.append(max_new_tokens), streamer.put(input_ids), streamer.end()
    )  # fmt: skip
    short = Conversation(talk.model, tokenizer, SamplingFlags(max_new_tokens=8), None, context=12)
    for _ in range(4):
        assert short.take("ls")
    assert asked == [8, 8, 5, 2]
    err = capsys.readouterr().err
    assert err.count("the context is full") == 1 and "!clear" in err and "--context" in err


def test_without_a_flag_a_chat_is_bounded_by_the_plan(monkeypatch):
    """Not only where --context was given: the KV cache that the plan keeps room for has 2048 tokens then."""
    contexts = []

    class Stop(Exception):
        pass

    def made(*arguments):
        contexts.append(arguments[4])
        raise Stop

    monkeypatch.setattr("moe_offload.apps.generate.conversation.Conversation", made)
    for flags, reserve in (([], "auto"), (["--context", "64"], "auto"), ([], "102400"), (["--context", "64"], "1MB")):
        monkeypatch.setenv("MOE_OFFLOAD_RESERVE", reserve)
        result = CliRunner().invoke(app, ["chat", MODEL, "--budget", "8MB", *flags])
        assert isinstance(result.exception, Stop), result.output
    assert contexts == [2048, 64, 102400 // TOKEN_BYTES, 64], "a reserve of so many bytes has room for no more"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("!help", "!system TEXT"),
        ("!fly", "!fly is no command"),
        ("!set", "write NAME=VALUE"),
        ("!set fly=1", "write NAME=VALUE"),
        ("!set max_new_tokens=abc", "it takes a whole number from 1 on"),
        ("!set temperature=-1", "it takes a number from 0"),
        ("!set top_k=5", "set: top_k=5"),
        ("!save", "needs the name"),
        ("!save /no/such/folder/x.json", "was not saved"),
        ("!system Be brief", "told first"),
        ("!clear", "forgotten"),
        ("", ""),
    ],
)
def test_commands_are_one_answer(talk, capsys, line, says):
    assert talk.take(line) and talk.messages == []
    out, err = capsys.readouterr()
    assert out == "" and says in err and "Traceback" not in err


def test_ctrl_c_while_a_line_is_typed_drops_the_line(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "ls", KeyboardInterrupt, None])

    def read_line():
        line = next(typed)
        if line is KeyboardInterrupt:
            raise line
        return line

    seen = []
    monkeypatch.setattr(command, "_read_line", read_line)
    command._take_turns(SimpleNamespace(take=lambda line: seen.append(line) or True))
    assert seen == ["ls"] and capsys.readouterr().err.count("Ctrl-D") == 2
