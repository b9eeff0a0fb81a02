"""What all tests share: as many processes as cores (pytest-xdist) must not each start as many threads; the settings of
whoever runs them, in the environment or in a file, do not count; and no test leaves usage behind, or finds some."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A job that a shell started in the background is born with SIGINT ignored, and so are the processes that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MOE_OFFLOAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("moe_offload.config.file.default_path", lambda: Path("/nowhere/default_config.yaml"))


@pytest.fixture(autouse=True, scope="session")  # before any fixture that loads a model for several tests
def no_usage_is_remembered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_offload.plan.prepare.usage_folder", lambda: None)
        patch.setenv("HF_HOME", NO_HF_HOME)  # of processes that tests start: no folder can be there
        patch.setitem(globals(), "tests_run", True)
        yield


def refuse_to_leave_usage(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, while tests run: before, pytest-xdist starts its workers. What the fixture above sets does not
    reach a process that a test starts with an environment of its own, nor code that makes the user's folder without
    asking `plan/prepare.py`. Both fail here, where they happen."""
    if not tests_run:
        return
    if event == "subprocess.Popen":
        env = os.environ if args[3] is None else args[3]
        if "HF_HOME" not in map(os.fsdecode, env):
            raise AssertionError(f"{args[1]} runs without HF_HOME, and may leave usage in the user's: add os.environ")
    elif (
        (event == "os.mkdir" or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)))
        and isinstance(args[0], str | os.PathLike)
        and Path(args[0]).is_relative_to(USERS_FOLDER)
    ):
        raise AssertionError(f"a test writes {args[0]}, which is the user's: pass profile='off', or a folder of yours")


tests_run = False
NO_HF_HOME = f"{os.devnull}/huggingface"
USERS_FOLDER = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser().absolute() / "moe_offload"
sys.addaudithook(refuse_to_leave_usage)
