"""Each example runs from a fresh process, as its first lines say, and stays short enough to be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {
    "own_policy": "second_chance",
    "profile_a_workload": "Italian profile",
    "quickstart": "tokens equal: True",
    "remote_code": "tokens equal: True",
}


LONG = ("profile_a_workload",)  # its steps are tested one by one


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.long] * (p.stem in LONG), id=p.stem) for p in EXAMPLES]
)
def test_example(path, tmp_path):
    assert len(path.read_text().splitlines()) <= 60
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout
