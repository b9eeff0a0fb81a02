"""moe-offload env: what a bug report needs, also where the settings are what is wrong."""

from __future__ import annotations

import json

import torch
import transformers
from typer.testing import CliRunner

from moe_offload.apps.cli import app


def env(*arguments: str):
    return CliRunner().invoke(app, ["env", *arguments])


def test_the_machine_the_versions_and_where_each_setting_comes_from(monkeypatch, tmp_path):
    (tmp_path / "s.yaml").write_text("budget: 6MB\n")
    monkeypatch.setenv("MOE_OFFLOAD_KV_TOKENS", "64")
    arguments = ["--config-file", str(tmp_path / "s.yaml")]
    facts = json.loads(env(*arguments, "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["transformers"] == transformers.__version__
    assert facts["memory_bytes"] > facts["free_memory_bytes"] > 0 and facts["cpu"] and facts["gpu"]
    settings = facts["settings"]
    assert settings["budget"] == {"value": "6MB", "from": f"configuration file {tmp_path / 's.yaml'}"}
    assert settings["kv_tokens"] == {"value": 64, "from": "environment variable MOE_OFFLOAD_KV_TOKENS"}
    assert settings["policy"]["from"] == "default" and settings["file"]["value"] == str(tmp_path / "s.yaml")
    text = env(*arguments).stdout
    assert torch.__version__ in text and "6MB" in text and "MOE_OFFLOAD_KV_TOKENS" in text


def test_settings_that_are_wrong_are_part_of_the_report(monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_BUGET", "6MB")
    result = env("--json")
    assert result.exit_code == 0 and "MOE_OFFLOAD_BUDGET?" in json.loads(result.stdout)["settings"]["error"]
    assert "MOE_OFFLOAD_BUDGET?" in env().stdout
