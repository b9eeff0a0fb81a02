"""What all tests share: as many processes as cores (pytest-xdist) must not each start as many threads; the settings of
whoever runs them, in the environment or in a file, do not count; and no test leaves usage behind, or finds some."""

import os
import signal
from pathlib import Path

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
        patch.setenv("HF_HOME", f"{os.devnull}/huggingface")  # of processes that tests start: no folder can be there
        yield
