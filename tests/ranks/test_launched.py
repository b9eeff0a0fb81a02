"""`run` under a launcher prints the text of one process, once."""

import os
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from tests.paths import MODEL_NAME as MODEL
from tests.paths import ROOT

COMMAND = ["run", MODEL, "--budget", "5.5MB", "--prompt", "The ls command lists", "--max-new-tokens", "16"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.long)])
def test_the_text_is_that_of_one_process(launcher, tmp_path):
    alone = CliRunner().invoke(app, [word.replace("5.5MB", "6MB") for word in COMMAND])
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "moe_offload", *COMMAND]
    told = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == alone.stdout and len(told.stdout) > 30
    assert told.stderr.count("\nrank ") == 2 and told.stderr.count("\nall 2 ranks: hit rate") == 1
    assert told.stderr.count("time to first token") == 1


@pytest.mark.long
def test_what_one_process_refuses_at_its_command_line_the_others_hear():
    """Its budget, in its own environment, is none. Nobody else would end them: each was started by hand, as where each
    machine has a launcher of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "moe_offload", "run", MODEL]
    budgets = {0: "5.5MB", 1: "plenty"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **where, "OMP_NUM_THREADS": "1", "RANK": str(rank), "MOE_OFFLOAD_BUDGET": budget},
        )
        for rank, budget in budgets.items()
    ]
    try:
        told = [one.communicate(timeout=120)[1].strip() for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert [one.returncode for one in ranks] == [1, 2]
    assert told[1].startswith("moe-offload: rank 1: ") and "plenty" in told[1]
    assert "moe-offload: rank 0: rank 1 (process" in told[0] and "plenty" in told[0]
