"""What a person reads who typed a wrong value: what was given, what is wrong with it, what would be right; one line."""

from __future__ import annotations

import pytest

from moe_offload.apps.cli import main
from tests.observe.test_profile import PROFILE
from tests.paths import MODEL_NAME as MODEL


@pytest.fixture
def told(monkeypatch, capsys):
    """The one line that a command ends with, and its exit code."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["moe-offload", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1, out + err
        return int(str(ended.value.code)), err

    return run


SIZES = {
    "0": "0 bytes hold nothing",
    "0%": "0 bytes hold nothing",
    "0GB": "0 bytes hold nothing",
    "200%": "more than all there is: 100% at most",
    "-3GB": "a size is not negative: write 3GB",
    "8gigs": "the unit 'gigs' is unknown: write 8GB (decimal) or 8GiB (binary)",
    "8Q": "the unit 'Q' is unknown",
    "8 parsecs": "the unit 'parsecs' is unknown",
    "1,5GB": "a decimal point is a point: write 1.5GB",
    "nan": "it does not begin with a number",
    "": "it is empty",
    " ": "it is empty",
}


@pytest.mark.parametrize(("given", "wrong"), SIZES.items(), ids=repr)
def test_budget(told, given, wrong):
    code, line = told("plan", MODEL, "--budget", given)
    assert code == 2
    assert line.startswith("moe-offload: budget=") and given.strip() in line
    assert wrong in line and '"8GiB"' in line


def test_a_budget_with_a_space_is_a_budget(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moe-offload", "plan", MODEL, "--budget", "6 MB"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and "6.00 MB" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "wrong"), [("8gigs", SIZES["8gigs"]), ("50%", "no total"), ("-3GB", "negative")])
def test_the_budgets_of_estimate(told, given, wrong):
    code, line = told("estimate", MODEL, f"--budget=4GB,{given}")
    assert code == 2 and f"--budget: size {given!r}" in line and wrong in line


def test_the_size_of_shards(told, tmp_path):
    code, line = told("pack", MODEL, str(tmp_path / "out"), "--max-shard-size", "5gigs")
    assert code == 2 and "--max-shard-size: size '5gigs'" in line and "write 5GB" in line


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("0", "above 0"),
        ("0%", "above 0"),
        ("200%", "100% at most"),
        ("25", "100% at most: 25% ?"),
        ("-25%", "above 0"),
        ("a quarter", "no number"),
        ("nan", "no number"),
        ("", "it is empty"),
    ],
    ids=repr,
)
def test_residency(told, tmp_path, given, wrong):
    profile = tmp_path / "p.json"
    PROFILE.save(profile)
    for command in (["profile", "inspect", str(profile)], ["bench", MODEL]):
        code, line = told(*command, f"--residency={given}")
        assert code == 2 and f"--residency {given!r}" in line and wrong in line and "25%" in line


@pytest.mark.parametrize(
    ("flag", "given", "wrong"),
    [
        ("--device-map", "gpu", "'gpu' is no device"),
        ("--device-map", "", "'' is no device"),
        ("--device-map", "{x", "the mapping cannot be read"),
        ("--device-map", '{"": gpu}', "'gpu' is no device"),
        ("--max-memory", "8GB", "it is no mapping"),
        ("--max-memory", "{0: 8GB", "the mapping cannot be read"),
        ("--max-memory", "{gpu: 8GB}", "'gpu' is no device"),
        ("--max-memory", "{cpu: 8gigs}", "of 'cpu', the unit 'gigs' is unknown: write 8GB"),
    ],
)
def test_maps(told, flag, given, wrong):
    code, line = told("plan", MODEL, "--budget", "6MB", flag, given)
    assert code == 2 and wrong in line
    assert line.startswith(f"moe-offload: {flag.strip('-').replace('-', '_')}=")


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["run", "--max-new-tokens", "0"], "--max-new-tokens': '0' is not accepted: it takes a whole number from 1 on"),
        (
            ["run", "--max-new-tokens", "many"],
            "--max-new-tokens': 'many' is not accepted: it takes a whole number from 1 on",
        ),
        (
            ["run", "--max-new-tokens", "1.5"],
            "--max-new-tokens': '1.5' is not accepted: it takes a whole number from 1 on",
        ),
        (["run", "--max-new-tokens", ""], "--max-new-tokens': '' is not accepted: it takes a whole number from 1 on"),
        (
            ["run", "--metrics-port", "70000"],
            "--metrics-port': '70000' is not accepted: it takes a whole number from 1 to 65535",
        ),
        (["serve", "--port", "-1"], "--port': '-1' is not accepted: it takes a whole number from 0 to 65535"),
        (["plan", "--context", "-5"], "--context': '-5' is not accepted: it takes a whole number from 1 on"),
        (["families", "--jobs", "0"], "--jobs': '0' is not accepted: it takes a whole number from 1 on"),
        (["bench", "--layers", "0"], "--layers': '0' is not accepted: it takes a whole number from 1 on"),
        (["top", "--interval", "0"], "--interval': '0' is not accepted: it takes seconds from 0.05 to 3600"),
        (["top", "--interval", "nan"], "--interval': 'nan' is not accepted: it takes seconds from 0.05 to 3600"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_numbers(told, arguments, wrong):
    code, line = told(arguments[0], "x", *arguments[1:])
    assert code == 2 and wrong in line


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("serve model --api-key", "moe-offload serve"),
        ("run model --chat=yes", "moe-offload run"),
        ("profile merge a.json --out", "moe-offload profile merge"),
        ("--version=1", "moe-offload"),
    ],
)
def test_an_option_with_too_few_or_too_many_words_names_its_command(told, words, command):
    code, line = told(*words.split())
    assert code == 2 and line.startswith(f"{command}: ") and f"(see {command} --help)" in line
