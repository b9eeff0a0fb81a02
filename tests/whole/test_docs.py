"""The commands and programs of the pages run, in their order, on the bundled model."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from moe_offload.apps.cli import main
from tests.house.test_docs import PAGES, blocks, commands, named
from tests.paths import MODEL_NAME as MODEL
from tests.paths import ROOT

#: They end when somebody ends them, look at what runs beside them, or take minutes: tests of their own run these.
UNRUN = {"serve", "chat", "top", "bench", "families"}


def runnable(page: Path) -> list[list[str]]:
    ours = [words for words in commands(page) if words[0] == "moe-offload" and words[1] not in UNRUN]
    return [words for words in ours if "--chat" not in words]  # the bundled model has no chat template


def programs(page: Path) -> list[str]:
    return [block.text for block in blocks(page) if block.language == "python" and block.runs]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader might stand: a few texts, and the folder of examples as in the clone."""
    texts = json.loads((ROOT / "examples" / "texts.json").read_text(encoding="utf-8"))
    for name, language in (("pages", "it"), ("other", "en")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(texts[language]["record"][0][:600], encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expanded(words: list[str]) -> list[str]:
    """As a shell expands them; with the bundled model, and few tokens where the page does not say how many."""
    found = []
    for word in words:
        word = MODEL if word == "MODEL" else word
        found += sorted(map(str, Path().glob(word))) if "*" in word and "{" not in word else [word]
    return [*found, "--max-new-tokens", "8"] if words[1] == "run" and "--max-new-tokens" not in words else found


@pytest.mark.parametrize("page", named([page for page in PAGES if runnable(page)]))
def test_commands_run(page, folder, monkeypatch, capsys):
    for words in runnable(page):
        monkeypatch.setattr("sys.argv", expanded(words))
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert not ended.value.code, f"{shlex.join(words)}: {told.err}"
        assert told.out or told.err, f"{shlex.join(words)} says nothing"


@pytest.mark.parametrize("page", named([page for page in PAGES if programs(page)]))
def test_programs_run(page, folder):
    for program in programs(page):
        names: dict[str, object] = {}
        exec(compile(program.replace('"MODEL"', repr(MODEL)), f"{page.name}", "exec"), names)
        if hasattr(names.get("model"), "moe_offload"):
            names["model"].moe_offload.close()


def test_the_readme_is_run():
    assert os.fspath(ROOT / "README.md") in {os.fspath(p) for p in PAGES if runnable(p) and programs(p)}
