"""What people already use around a model: launchers, Accelerator.prepare, torch.compile by the backend's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_offload.apps.families.tiny import build
from tests.fakes.offloaded import IDS, QWEN, offloaded, resident, say
from tests.paths import ROOT

CHILD = """
import json, os
from pathlib import Path
from moe_offload.config.settings import resolve_settings
print(json.dumps([os.environ["RANK"], resolve_settings().to_dict()]))
"""


def launch(*launcher: str, tmp_path: Path, **environment: str) -> tuple[str, dict]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def test_torchrun_hands_the_settings_on(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("budget: 6MB\npolicy: lfu\n")
    rank, found = launch(
        *("torch.distributed.run", "--nproc_per_node", "1"),
        tmp_path=tmp_path,
        MOE_OFFLOAD_CONFIG_FILE=str(file),
        MOE_OFFLOAD_POLICY="lru",
    )
    assert rank == "0" and (found["budget"], found["policy"]) == ("6MB", "lru")


def test_accelerate_launch_hands_the_settings_on(tmp_path):
    _, found = launch(
        *("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"),
        *("--dynamo_backend", "no", "--mixed_precision", "no"),
        tmp_path=tmp_path,
        MOE_OFFLOAD_BUDGET="6MB",
        RANK="0",
    )
    assert found["budget"] == "6MB"


def test_accelerates_own_file_refuses_our_keys(tmp_path):
    """Why we have a file of our own."""
    from accelerate.commands.config.config_args import load_config_from_file

    file = tmp_path / "default_config.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmoe_offload_budget: 8GB\n")
    with pytest.raises(ValueError, match="moe_offload_budget"):
        load_config_from_file(str(file))


def test_accelerator_prepare_leaves_an_offloaded_model_as_it_is():
    from accelerate import Accelerator

    want = say(resident(layers=2))
    model = offloaded(layers=2)
    prepared = Accelerator(cpu=True).prepare(model)
    assert prepared is model and torch.equal(say(prepared), want)
    model.moe_offload.close()


def test_the_backend_is_known_by_name_and_says_what_is_missing():
    assert "moe_offload" in torch._dynamo.list_backends(exclude_tags=())
    model = torch.compile(build(QWEN, num_hidden_layers=1), backend="moe_offload")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"call moe_offload.optimize"):
        model(IDS)


def test_the_backend_by_name_around_an_offloaded_model():
    want = resident(layers=1)(IDS).logits
    model = offloaded(layers=1)
    compiled = torch.compile(model, backend="moe_offload")
    torch.testing.assert_close(compiled(IDS).logits, want, rtol=1e-5, atol=1e-5)
    model.moe_offload.close()
