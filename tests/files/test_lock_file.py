"""One holder at a time, and none that is dead."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_offload.files.lock_file import held
from tests.paths import ROOT

HOLD = "import sys, time; from moe_offload.files.lock_file import held; from pathlib import Path\n" \
    "with held(Path(sys.argv[1]), 5): print('held', flush=True); time.sleep(600)"  # fmt: skip


def test_a_second_holder_waits_and_is_told(tmp_path):
    lock = tmp_path / ".lock"
    with held(lock, 1), pytest.raises(TimeoutError, match="another process"), held(lock, 0.02):
        pytest.fail("held twice")
    with held(lock, 0):
        pass


def test_a_holder_that_is_killed_holds_nothing(tmp_path):
    lock = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), held(lock, 0.02):
            pytest.fail("held twice")
        process.kill()
    with held(lock, 5):
        pass


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), held(tmp_path / "nowhere" / ".lock", 1):
        pytest.fail("held a file that cannot be")
