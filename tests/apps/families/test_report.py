"""moe-offload families: a line as each family is done, JSON, and the table of the documentation."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.families import report
from moe_offload.apps.families.check import FamilyResult


@pytest.fixture
def checked(monkeypatch):
    """Families whose check says what this dict has."""
    results = {
        "mixtral": FamilyResult("mixtral", "exact", "", "MixtralForCausalLM", 2, 8, 2, 3),
        "dbrx": FamilyResult("dbrx", "refused", "its experts | are modules", "DbrxForCausalLM"),
    }
    monkeypatch.setattr(report, "available_families", lambda: sorted(results))
    monkeypatch.setattr(report, "unlisted_families", lambda: ["newest"])
    monkeypatch.setattr(report, "_checked", lambda name, matrix, compile: results[name])
    monkeypatch.setattr(report, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    return results


def families(*arguments: str):
    return CliRunner().invoke(app, ["families", *arguments])


def test_each_row_is_printed_when_it_is_done(checked):
    seen: list[str] = []
    rows = report.check_families([], compile="graph", matrix=False, jobs=1, done=lambda row: seen.append(row.family))
    assert seen == ["newest", "dbrx", "mixtral"], "as they come"
    assert [row.family for row in rows] == ["dbrx", "mixtral", "newest"], "in the order of the names"
    result = families()
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and len(lines) == 4 and lines[-1] == "1 exact, 2 refused, 0 different or failed"
    (mixtral,) = [line for line in lines if line.startswith("mixtral")]
    assert "exact" in mixtral and "8 experts, top-2" in mixtral and "3 runs" in mixtral


def test_json_and_markdown_are_alone_on_standard_output(checked):
    rows = json.loads(families("--json").stdout)
    assert [row["family"] for row in rows] == ["dbrx", "mixtral", "newest"]
    table = families("--markdown").stdout.splitlines()
    assert table[0] == "| family | model | status | reason |" and "`mixtral`" in table[3]
    assert "its experts \\| are modules" in table[2], "a bar in a cell is escaped"


def test_one_that_differs_is_exit_code_1(checked):
    checked["mixtral"] = FamilyResult("mixtral", "different", "logits of step 3", "MixtralForCausalLM")
    result = families("mixtral")
    assert result.exit_code == 1 and "logits of step 3" in result.stdout
