"""No test leaves usage in the folder of whoever runs them: `tests/conftest.py` refuses it where it happens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import USERS_FOLDER


def test_a_process_with_an_environment_of_its_own_is_refused() -> None:
    without = {name: value for name, value in os.environ.items() if name != "HF_HOME"}
    with pytest.raises(AssertionError, match="runs without HF_HOME"):
        subprocess.run([sys.executable, "-c", ""], env=without)
    subprocess.run([sys.executable, "-c", ""], env=dict(os.environ), check=True)
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_a_folder_in_the_users_is_refused() -> None:
    with pytest.raises(AssertionError, match="which is the user's"):
        (USERS_FOLDER / "profiles").mkdir(parents=True)
    with pytest.raises(AssertionError, match="which is the user's"):
        (USERS_FOLDER / "a.json").write_text("{}")
