"""moe-offload config: the file it writes, the questions it asks, and that other commands read it."""

from __future__ import annotations

import dataclasses
import json
import pty
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.cli.config import QUESTIONS, _ask
from moe_offload.apps.cli.setting_flags import SettingFlags
from moe_offload.config import file as config_file
from moe_offload.config.rules import RULES
from moe_offload.config.settings import OffloadConfig, resolve_settings
from tests.observe.test_profile import PROFILE
from tests.paths import MODEL_NAME as MODEL


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def default(tmp_path, monkeypatch):
    path = tmp_path / "moe_offload" / "default_config.yaml"
    monkeypatch.setattr(config_file, "default_path", lambda: path)
    return path


def test_it_writes_the_default_file_from_flags(default):
    result = run("config", "--budget", "6MB", "--max-memory", "{cpu: 1GB}", "--context", "64", "--yes")
    assert result.exit_code == 0 and str(default) in result.stderr, result.output
    assert config_file.read_settings(default) == {"budget": "6MB", "max_memory": {"cpu": "1GB"}, "kv_tokens": 64}
    assert resolve_settings() == OffloadConfig(budget="6MB", max_memory={"cpu": "1GB"}, kv_tokens=64)
    assert run("config", "--budget", "7MB", "--max-memory", "none", "-y").exit_code == 0
    assert config_file.read_settings(default) == {"budget": "7MB", "kv_tokens": 64}, "what no flag says stays as it was"


def test_every_setting_has_a_flag():
    """And one that is added is missed here: what --show prints can be said without an editor."""
    assert {field.name for field in dataclasses.fields(SettingFlags)} == set(RULES)


def test_the_rarer_settings_are_written_too(default):
    flags = ["--half-life", "16", "--reserve", "1GB", "--wave-rows", "8", "--lookahead", "yes", "--overlap", "none"]
    flags += ["--prewarm", "no", "--live", "on", "--experts-implementation", "batched_mm", "--dynamic", "false"]
    result = run("config", *flags, "-y")
    assert result.exit_code == 0, result.output
    wanted = {"half_life": 16.0, "reserve": "1GB", "wave_rows": 8, "lookahead": True, "prewarm": False, "live": True}
    assert config_file.read_settings(default) == wanted | {"experts_implementation": "batched_mm", "dynamic": False}
    assert resolve_settings().half_life == 16.0
    for flag, text, says in [("--half-life", "0", "half_life=0.0"), ("--lookahead", "perhaps", "lookahead='perhaps'")]:
        result = run("config", flag, text, "-y")
        assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1
    assert config_file.read_settings(default)["half_life"] == 16.0, "what was there stays"


def test_without_a_terminal_it_asks_for_flags(default):
    result = run("config")
    assert result.exit_code == 2 and "--yes" in result.stderr and not default.exists()


def test_a_flag_that_means_nothing_writes_nothing(default):
    result = run("config", "--budget", "much", "--yes")
    assert result.exit_code == 2 and "budget='much'" in result.stderr and not default.exists()


def test_a_file_that_is_broken_is_not_overwritten(default):
    default.parent.mkdir()
    default.write_text("halflife: 3")
    result = run("config", "--budget", "6MB", "--yes")
    assert result.exit_code == 2 and "half_life" in result.stderr and default.read_text() == "halflife: 3"


def test_questions_are_asked_until_the_answer_is_accepted():
    answers = iter(["much", "8GB", "{cpu: 60GiB}", "disk", "none", "off", "4096", "fast", "graph", "none"])
    asked = []

    def prompt(question, default):
        asked.append((question, default))
        return next(answers)

    values = _ask(OffloadConfig(), skip=set(), prompt=prompt)
    assert values.changed() == {
        "budget": "8GB",
        "max_memory": {"cpu": "60GiB"},
        "device_map": "disk",
        "profile": "off",
        "kv_tokens": 4096,
        "compile": "graph",
    }
    assert [q for q, _ in asked][:2] == [QUESTIONS["budget"]] * 2 and asked[0][1] == "none"
    assert _ask(values, skip=set(QUESTIONS), prompt=prompt) == values, "what a flag says is not asked"


def test_a_profile_that_is_not_there_is_asked_for_again(tmp_path):
    PROFILE.save(tmp_path / "p.json")
    answers = iter([str(tmp_path / "nowhere.json"), str(tmp_path / "p.json")])
    values = _ask(OffloadConfig(), skip=set(QUESTIONS) - {"profile"}, prompt=lambda question, default: next(answers))
    assert values.profile == str(tmp_path / "p.json")


def test_enter_keeps_what_is_there():
    values = OffloadConfig(budget="8GB", max_memory={0: "8GB", "cpu": 10**9}, profile="it.json")
    assert _ask(values, skip=set(), prompt=lambda question, default: default) == values


def test_on_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    path = tmp_path / "new.yaml"
    command = [sys.executable, "-m", "moe_offload", "config", "--config-file", str(path), "--policy", "lru"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(ours, "w", closefd=False) as keyboard:
        keyboard.write("8GB\n" + "\n" * (len(QUESTIONS) - 1))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f"--config-file {path}" in err, err
    assert config_file.read_settings(path) == {"budget": "8GB", "policy": "lru"} and "budget: 8GB" in out


def test_show_tells_where_each_value_is_from(default, monkeypatch):
    assert run("config", "--budget", "6MB", "--yes").exit_code == 0
    monkeypatch.setenv("MOE_OFFLOAD_POLICY", "lru")
    found = json.loads(run("config", "--show", "--json").stdout)
    assert found["budget"] == {"value": "6MB", "from": f"configuration file {default}"}
    assert found["policy"] == {"value": "lru", "from": "environment variable MOE_OFFLOAD_POLICY"}
    assert found["kv_tokens"]["from"] == "default"
    assert "environment variable MOE_OFFLOAD_POLICY" in run("config", "--show").stdout


@pytest.mark.parametrize("flag", ["--config_file", "--config-file"])
def test_other_commands_read_the_file(flag, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("budget: 6MB\nkv_tokens: 64\n")
    found = json.loads(run("plan", MODEL, flag, str(path), "--json").stdout)
    assert found["budget"] == 6_000_000
    assert json.loads(run("plan", MODEL, flag, str(path), "--budget", "7MB", "--json").stdout)["budget"] == 7_000_000
    refused = run("plan", MODEL, flag, str(tmp_path / "gone.yaml"))
    assert refused.exit_code == 2 and "gone.yaml" in refused.stderr
    path.write_text("bugdet: 6MB")
    refused = run("run", MODEL, flag, str(path))
    assert refused.exit_code == 2 and "did you mean 'budget'" in refused.stderr
