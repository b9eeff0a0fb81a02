"""The command line, as a person types it: what goes where, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from moe_offload.apps.cli import app, main
from tests.paths import MODEL_NAME as MODEL


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_plan() -> None:
    result = run("plan", MODEL, "--budget", "6MB")
    assert result.exit_code == 0 and "floor" in result.stdout and "expert slots" in result.stdout
    facts = json.loads(run("plan", MODEL, "--budget", "6MB", "--json").stdout)
    assert facts["budget"] == 6_000_000 and facts["floor"] <= 6_000_000 and len(facts["slots"]) == 4


def test_run_prints_the_text_and_saves_a_profile(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, plain = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    inputs = tokenizer("Il comando", return_tensors="pt")
    tokens = plain.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    profile = tmp_path / "it.json"
    common = ["run", MODEL, "--budget", "6MB", "--prompt", "Il comando", "--max-new-tokens", "16"]
    first = run(*common, "--save-profile", str(profile))
    assert (first.exit_code, first.stdout) == (0, text + "\n"), first.output
    assert "6.00 MB" in first.stderr and "hit rate" in first.stderr
    second = run(*common, "--profile", str(profile))
    assert (second.exit_code, second.stdout) == (0, text + "\n"), second.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan", MODEL, "--budget", "1MB"], 3, "floor"),
        (["plan", MODEL, "--budget", "much"], 2, "much"),
        (["plan", "./nowhere", "--budget", "6MB"], 4, "nowhere"),
        (["plan", MODEL, "--device-map", "{x"], 2, "device_map"),
        (["plan", MODEL, "--device-map", '{"": 0}'], 3, "how much of cuda:0"),
        (["plan", MODEL, "--profile", "nowhere.json"], 6, "nowhere.json"),
        (["estimate", MODEL, "--budget", "much"], 2, "--budget"),
        (["estimate", MODEL, "--budget", ","], 2, "part 1 of 2 is empty"),
        (["estimate", "./nowhere"], 4, "nowhere"),
        (["run", MODEL, "--budget", "6MB", "--profile", "nowhere.json"], 6, "nowhere.json"),
        (["run", MODEL, "--budget", "6MB", "--save-profile", "no/such/folder/x.json"], 2, "folder does not exist"),
        (["run", MODEL, "--budget", "6MB", "--save-trace", "."], 2, "--save-trace .: that is a folder"),
        (["run", MODEL, "--budget", "6MB", "--save-report", "/proc/x.json"], 2, "nothing can be written in its folder"),
        (["run", MODEL, "--budget", "6MB", "--prompt", ""], 2, "prompt is empty"),
        (["run", MODEL, "--budget", "6MB", "--compile", "fast"], 2, "fast"),
        (["families", "no_such_family"], 2, "no_such_family"),
    ],
)
def test_what_cannot_work_is_one_line_and_a_code(arguments: list[str], code: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr and "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("moe-offload:")]) == 1


def commands(group: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """`group` and everything below it, with what a person types to get there."""
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *words, name)


COMMANDS = {" ".join(words): command for words, command in commands(get_command(app))}


@pytest.mark.parametrize("words", COMMANDS)
def test_help_cuts_nothing_at_80_columns(words: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*words.split(), "--help")
    assert result.exit_code == 0 and "Usage" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80 and "…" not in result.stdout
    shown = result.stdout.split()
    for parameter in COMMANDS[words].params:
        for name in [*parameter.opts, *parameter.secondary_opts]:
            assert parameter.param_type_name == "argument" or name in [word.rstrip(",") for word in shown]
    for inner in getattr(COMMANDS[words], "commands", {}).values():
        assert (inner.short_help or inner.help) in " ".join(shown)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--budgt", "6MB", MODEL], "moe-offload run: No such option: --budgt"),
        (["nosuch"], "No such command"),
        (["run"], "Missing argument"),
        (["run", MODEL, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["serve", MODEL, "--port", "abc"], "--port"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments, says, monkeypatch, capsys):
    """As the console script ends, which the runner of the tests above does not show."""
    monkeypatch.setattr("sys.argv", ["moe-offload", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and says in err and len(err.splitlines()) == 1 and "--help" in err


def test_the_console_script_ends_as_its_command_does(monkeypatch, capsys):
    for arguments, code, words in [
        (["--version"], 0, "moe-offload 0."),
        ([], 2, "Usage"),
        (["profile"], 2, "Usage"),
        (["plan", MODEL, "--budget", "1MB"], 3, "floor"),
        (["plan", MODEL, "--budget", "6MB"], 0, "budget 6.00 MB"),
    ]:
        monkeypatch.setattr("sys.argv", ["moe-offload", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code, arguments
        assert words in "".join(capsys.readouterr())
