"""`families --foreign`: folders with code of their own, exact or said why not."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from tests.fakes.remote_folder import write_remote


@pytest.fixture
def folders(tmp_path):
    for loop in ("hits", "one_hot"):
        write_remote(tmp_path / "all" / f"foreign_{loop}", loop)
    (tmp_path / "all" / "foreign_hits" / "model.safetensors").unlink()  # no weights are needed
    return tmp_path / "all"


def test_each_folder_has_a_row(folders):
    done = CliRunner().invoke(app, ["families", "--foreign", str(folders), "--json"])
    rows = json.loads(done.stdout)
    assert [(row["family"], row["status"], row["cases"]) for row in rows] == [
        ("foreign_hits", "exact", 6),
        ("foreign_one_hot", "exact", 6),
    ]
    assert done.exit_code == 0


def test_one_that_fails_does_not_hide_the_others(folders):
    (folders / "foreign_hits" / "modeling_loops.py").write_text("raise ZeroDivisionError('on purpose')\n")
    done = CliRunner().invoke(app, ["families", "--foreign", str(folders)])
    assert "on purpose" in done.stdout and "exact" in done.stdout and done.exit_code == 1


def test_a_folder_without_code_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["families", "--foreign", str(tmp_path)])
    assert done.exit_code == 2 and "auto_map" in done.output
