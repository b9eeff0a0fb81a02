"""What is imported by when: seconds of torch and transformers come after all that can be refused without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_offload.observe.trace import Trace
from tests.observe.test_profile import PROFILE
from tests.paths import MODEL_NAME as MODEL
from tests.paths import ROOT

#: Runs commands one after the other in one process; prints each one's exit code and what has been imported by then.
COMMANDS = """
import json, sys
from moe_offload.apps.cli import main
seen = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["moe-offload", *arguments]
    try:
        main()
    except SystemExit as end:
        seen.append([end.code or 0, sorted({name.partition(".")[0] for name in sys.modules})])
print()
print(json.dumps(seen))
"""


def child(program: str, *arguments: str, cwd: Path = ROOT) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def check(folder: Path, commands: dict[str, int], without: set[str]) -> None:
    """Each command ends with its exit code, and nothing of `without` was imported until then."""
    answers = json.loads(child(COMMANDS, json.dumps([command.split() for command in commands]), cwd=folder))
    for (command, code), (ended, modules) in zip(commands.items(), answers, strict=True):
        assert (command, ended, without & set(modules)) == (command, code, set())


@pytest.fixture
def folder(tmp_path):
    """With a profile, a trace, and a folder that is no checkpoint."""
    PROFILE.save(tmp_path / "p.json")
    Trace.of(np.array([[[0, 1], [1, 2]]] * 8), num_experts=[4, 4]).save(tmp_path / "t.npz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").symlink_to(MODEL)
    (tmp_path / "untold").mkdir()  # a checkpoint without a tokenizer
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "untold" / name).symlink_to(Path(MODEL) / name)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "without"),
    [
        ("OffloadConfig", {"torch", "transformers", "pydantic"}),
        ("Profile, OffloadConfig, Trace", {"torch", "transformers"}),
        ("optimize, from_pretrained, make_plan, forecast, pack_checkpoint, record_profile", {"transformers"}),
    ],
)
def test_what_only_a_loaded_model_needs_is_not_imported_before(names, without):
    assert not without & set(child(f"from moe_offload import {names}\nprint(*sys.modules)").split())


def test_commands_without_a_model_need_no_torch(folder):
    commands = {
        "--help": 0,
        "run --help": 0,
        "config --show": 0,
        "top 1": 7,
        "profile merge p.json p.json --out both.json": 0,
        "profile diff p.json both.json": 0,
        "profile inspect p.json --residency 50%": 0,
    }
    check(folder, commands, {"torch", "transformers", "numba"})  # and tables of profiles no compiler
    check(folder, {"simulate t.npz --policies lru": 0, "report nowhere.json": 6}, {"torch", "transformers"})


@pytest.mark.parametrize("model", ["./nowhere", "empty", "p.json"])
def test_a_model_that_is_not_there_is_refused_first(folder, model):
    commands = [
        f"plan {model} --budget 8GB",
        f"estimate {model}",
        f"estimate model {model}",
        f"run {model}",
        f"serve {model}",
        f"chat {model}",
        f"pack {model} new",
        f"bench {model} --budget 8GB",
        f"profile record {model} p.json --out new.json",
        f"profile inspect p.json --budget 8GB --model {model}",
    ]
    check(folder, dict.fromkeys(commands, 4), {"torch", "transformers"})


def test_wrong_settings_inputs_and_outputs_are_refused_first(folder):
    commands = {
        "plan model --budget 8gigs": 2,
        "plan model --profile nowhere.json": 6,
        "estimate model --budget 8GB,8gigs": 2,
        "run model --budget 8gigs": 2,
        "run model --profile nowhere.json": 6,
        "run model --save-report no/such/folder/x.json": 2,
        "run model --dtype float8": 2,
        "run model --file nowhere.txt": 2,
        "run untold": 4,
        "chat untold": 4,
        "serve model --budget 8gigs": 2,
        "serve model --save-profile no/such/folder/x.json": 2,
        "chat model --save-profile no/such/folder/x.json": 2,
        "pack model p.json": 6,
        "pack model new --max-shard-size 8gigs": 2,
        "bench model --budget 8gigs": 2,
        "bench model --budget 8GB --residency 25%": 2,
        "bench model --budget 8GB --out no/such/folder/x.json": 2,
        "bench synthetic:foo": 2,
        "bench synthetic:tiny --layers 9": 2,
        "profile record model nowhere.txt --out new.json": 6,
        "profile record model p.json --out no/such/folder/x.json": 2,
        "simulate t.npz --residency 200%": 2,
        "simulate p.json": 6,
    }
    check(folder, commands, {"torch", "transformers"})


def test_import_is_light():
    program = (
        "import sys, threading, moe_offload\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'\n"
        "assert threading.enumerate() == [threading.main_thread()], f'threads: {threading.enumerate()}'\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized(), 'CUDA was started'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
