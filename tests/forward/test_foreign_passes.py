"""Somebody else's `passes` in front on the path is named at once, and is not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

LOUD = "raise SystemExit('the other passes was run')"


def imported(program: str, folder: Path, *options: str, ours: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`program` in a fresh interpreter that has `folder` in front on its path, and our packages in `ours` after it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ours)])}
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("other", ["passes.py", "passes/__init__.py"])
@pytest.mark.parametrize("door", ["import moe_offload.forward", "import moe_offload; moe_offload.optimize"])
def test_another_package_of_that_name_is_refused(tmp_path, other, door):
    file = tmp_path / other
    file.parent.mkdir(exist_ok=True)
    file.write_text(LOUD)
    done = imported(door, tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moe_offload.errors.OffloadError: ") and str(file) in last and str(ROOT) in last


def test_one_that_was_imported_before_is_refused(tmp_path):
    (tmp_path / "passes.py").write_text("")
    done = imported("import passes, moe_offload.forward", tmp_path)
    assert done.returncode == 1 and str(tmp_path / "passes.py") in done.stderr.splitlines()[-1]


def test_none_at_all_is_said(tmp_path):
    (tmp_path / "moe_offload").symlink_to(ROOT / "moe_offload")  # an installation that lost half of it
    done = imported("import moe_offload.forward", tmp_path, "-S", ours=tmp_path)  # and no site-packages
    assert done.returncode == 1 and "`import passes` gives nothing" in done.stderr


def test_a_folder_of_that_name_without_code_is_no_collision(tmp_path):
    (tmp_path / "passes").mkdir()
    assert imported("import moe_offload.forward, passes; passes.find_sites", tmp_path).returncode == 0
