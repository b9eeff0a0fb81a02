"""Versions that are newer than what was tested: a warning, once, and no refusal."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError

import pytest

from moe_offload.forward import tested_versions
from moe_offload.forward.tested_versions import NEWEST, warn_of_untested_versions
from tests.fakes.offloaded import offloaded
from tests.paths import ROOT


@pytest.fixture
def installed(monkeypatch):
    found = {name: f"{major}.{minor}.3+cpu" for name, (major, minor) in NEWEST.items()}

    def version(name: str) -> str:
        if found[name] is None:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(tested_versions, "version", version)
    warn_of_untested_versions.cache_clear()
    yield found
    warn_of_untested_versions.cache_clear()


def test_newer_versions_are_said_once_and_run(installed, caplog):
    installed["torch"], installed["transformers"] = "2.99.0a0+git1", "6.0.0"
    for _ in range(2):
        offloaded().moe_offload.close()
    said = [record.message for record in caplog.records if "was tested with" in record.message]
    assert len(said) == 1
    assert "installed: torch 2.99.0a0+git1, transformers 6.0.0." in said[0] and "accelerate up to 1.15" in said[0]


@pytest.mark.parametrize("text", ["2.14.9", "2.2.0", "unreadable", None])
def test_others_are_not_mentioned(installed, caplog, text):
    installed["torch"] = text
    warn_of_untested_versions()
    assert caplog.text == ""


def test_the_page_says_what_was_tested_and_the_package_has_no_other_bound():
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    required = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("dependencies = [")[2].partition("]")[0]
    for name, (major, minor) in NEWEST.items():
        (bound,) = re.findall(rf'"{name}(.*?)"', required)
        assert re.fullmatch(r">=[\d.]+", bound), f"{name}{bound}: pip would refuse to install beside a newer one"
        assert re.search(rf"^\| {name} \| .* to {major}\.{minor}\b", page, re.MULTILINE), name
