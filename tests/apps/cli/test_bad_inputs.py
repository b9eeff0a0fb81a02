"""What people get wrong at a shell: each is one line that says what is wrong, with the exit code of its kind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_offload import errors
from moe_offload.apps.cli import main
from moe_offload.apps.options.checks import check_model
from moe_offload.apps.options.ending import exit_code
from moe_offload.checkpoint.outline import outline_folder
from tests.paths import MODEL, ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the commands below name."""
    made: Path = tmp_path_factory.mktemp("bad")
    weights = (MODEL / "model.safetensors").read_bytes()
    config = json.loads((MODEL / "config.json").read_text())
    flipped = bytearray(weights)
    flipped[20] ^= 0xFF
    for name, data in {
        "truncated": weights[:-1000],
        "hollow": b"",
        "random": bytes(range(256)) * 40,
        "flipped": bytes(flipped),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }.items():
        checkpoint(made / name, config, data)
    checkpoint(made / "broken", config, weights)
    (made / "broken" / "config.json").write_text('{"model_type": ')
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    for name, there in {"listed": "model-00002-of-00002.safetensors", "unfetched": None}.items():
        checkpoint(made / name, config, weights)
        (made / name / "model.safetensors.index.json").write_text(json.dumps(index))
        weights_file = made / name / "model.safetensors"
        weights_file.rename(weights_file.with_name(there)) if there else weights_file.unlink()
    checkpoint(made / "named", {**config, "transformers_weights": "other.safetensors"}, weights)
    for method in ("gptq", "awq"):
        checkpoint(made / method, {**config, "quantization_config": {"quant_method": method, "bits": 4}}, weights)
    inner = {**config, "text_config": {"quantization_config": {"quant_method": "hqq"}}}
    checkpoint(made / "hqq", inner, weights)
    checkpoint(made / "alien", {**config, "model_type": "alien", "architectures": ["AlienForCausalLM"]}, weights)
    (made / "model").symlink_to(MODEL)
    for name in ("nothing", "full"):
        (made / name).mkdir()
    (made / "full" / "a.txt").touch()
    checkpoint(made / "mistyped", {**config, "num_hidden_layers": "two"}, weights)
    (made / "pickled").mkdir()
    shutil.copy(MODEL / "config.json", made / "pickled")
    (made / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    for name in ("hollow.json", "hollow.npz", "hollow.gguf"):
        (made / name).touch()
    (made / "bad.yaml").write_text("budget: [8GB")
    (made / "unknown.yaml").write_text("budgte: 8GB")
    (made / "profiled.yaml").write_text("profile: nowhere.json")
    (made / "timeline.json").write_text('{"traceEvents": []}')
    return made


def checkpoint(path: Path, config: dict[str, Any], weights: bytes) -> None:
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, path / name)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(weights)


BAD = {
    # the command line
    "rnu model": (2, "No such command"),
    "run": (2, "Missing argument"),
    "run model --budgte 8GB": (2, "--budgte"),
    "run model --config-flie x": (2, "--config-flie"),
    "run model --max-new-tokens -3": (2, "from 1 on"),
    "run model --max-new-tokens abc": (2, "from 1 on"),
    "run model --metrics-port 70000": (2, "from 1 to 65535"),
    "run model --compile foo": (2, "compile='foo'"),
    "run model --revision main": (2, "model is a folder"),
    "run model --policy foo": (2, "policy='foo'"),
    "run model --save-trace full": (2, "that is a folder"),
    "run model --save-report no/x.json": (2, "its folder does not exist"),
    "run model --save-report gptq/config.json": (2, "a file of a checkpoint"),
    "run model --save-profile gptq/model.safetensors": (2, "a file of a checkpoint"),
    "plan model --ranks 99999999999999999999": (2, "from 1 to 4096"),
    "chat model max_new_tokens=abc": (2, "max_new_tokens=abc"),
    "chat model --max-new-tokens abc": (2, "from 1 on"),
    "serve model --port 99999": (2, "from 0 to 65535"),
    "serve model --port abc": (2, "from 0 to 65535"),
    "top abc": (2, "is no process"),
    "bench synthetic:foo": (2, "no such architecture"),
    "bench model --residency 200%": (2, "200%"),
    "bench model --device tpu": (2, "it takes cpu, cuda"),
    "bench synthetic:tiny --sides ,": (2, "--sides ',': part 1 of 2 is empty"),
    "bench synthetic:tiny --sides ours,,mmap": (2, "part 2 of 3 is empty"),
    "bench synthetic:tiny --residency 25%,": (2, "--residency '25%,': part 2 of 2 is empty"),
    "bench synthetic:tiny --sides ours@99%": (2, "99% is not among what is measured, 25%"),
    "bench synthetic:tiny --sides foo": (2, "there are resident, ours"),
    "bench model --layers 2": (2, "--layers is for synthetic:"),
    "bench model --budget 8GB --residency 25%": (2, "either --budget"),
    "simulate trace.npz --policies foo": (6, "trace.npz"),
    "pack model new --max-shard-size abc": (2, "--max-shard-size"),
    "pack model new --verify some": (2, "it takes sample, all, none"),
    "profile record model hollow.json --meta x --out p.json": (2, "key=value"),
    "families nosuch": (2, "no MoE family"),
    # what other tools call so
    "run model --ctx-size 4096": (2, "the flag for that is --context"),
    "run model --max_tokens 5": (2, "the flag for that is --max-new-tokens"),
    "run model -ngl 99": (2, "-ngl: the flag for that is --budget"),
    "run -m model": (2, "named without a flag"),
    "plan model --temp 0.7": (2, "No such option: --temp"),
    "ps": (2, "moe-offload top"),
    # sizes and maps
    "plan model --budget 0": (2, "hold nothing"),
    "plan model --budget=-1GB": (2, "not negative"),
    "plan model --budget 120%": (2, "100% at most"),
    "plan model --budget 1e400GB": (2, "1e400GB"),
    "plan model --device-map banana": (2, "'banana' is no device"),
    "plan model --device-map {a": (2, "cannot be read"),
    "plan model --max-memory 8GB": (2, "no mapping"),
    "plan model --context -1": (2, "from 1 on"),
    "run model --context 0": (2, "from 1 on"),
    "plan model --budget 10": (3, "below the floor"),
    "plan model --budget 3MB": (3, "at least"),
    "run model --budget 3MB": (3, "at least"),
    "estimate model --budget ,": (2, "part 1 of 2 is empty"),
    "estimate model --budget=": (2, "--budget '': it is empty"),
    "estimate model --budget 4GB,,8GB": (
        2,
        "--budget '4GB,,8GB': part 2 of 3 is empty; write it by commas, as 4GB,8GB",
    ),
    "profile merge hollow.json hollow.json --weights 1, --out x.json": (2, "--weights '1,': part 2 of 2 is empty"),
    # files of settings, profiles, traces, runs
    "plan model --config-file nowhere.yaml": (2, "nowhere.yaml"),
    "plan model --config-file bad.yaml": (2, "bad.yaml"),
    "plan model --config-file unknown.yaml": (2, "did you mean 'budget'?"),
    "plan model --config-file profiled.yaml": (6, "profiled.yaml"),
    "config --show --config-file nowhere.yaml": (2, "nowhere.yaml"),
    "config --yes --profile nowhere.json --config-file new.yaml": (6, "nowhere.json"),
    "run model --profile nowhere.json": (6, "nowhere.json"),
    "run model --profile hollow.json": (6, "empty"),
    "profile inspect timeline.json": (6, "it is a timeline"),
    "profile inspect hollow.json": (6, "empty"),
    "report nowhere.json": (6, "nowhere.json"),
    "report hollow.json": (6, "empty"),
    "report timeline.json": (6, "it is a timeline"),
    "report model/config.json": (6, "it is the configuration of a model"),
    "run model --profile model/config.json": (6, "it is the configuration of a model"),
    "simulate nowhere.npz": (6, "nowhere.npz"),
    "simulate hollow.npz": (6, "hollow.npz"),
    "pack model full": (6, "not empty"),
    "pack model /proc/foo": (6, "/proc/foo"),
    # checkpoints
    "run ./nowhere": (4, "nothing there"),
    "run a/b/c": (4, "nothing there"),
    "run qwen3:30b": (4, "'qwen3:30b': there is no folder of that name, and no Hub repository can have it"),
    "run nobody/nothing": (4, "cannot read the model's configuration"),
    "run nothing": (4, "no config.json"),
    "run pickled": (4, "pytorch_model.bin. Point at"),
    "run hollow.gguf": (4, "GGUF files are not read"),
    "run broken": (4, "config.json"),
    "run mistyped": (4, "num_hidden_layers"),
    "plan mistyped": (4, "num_hidden_layers"),
    "run truncated": (4, "model.safetensors: it is damaged"),
    "run hollow": (4, "model.safetensors: it is damaged"),
    "run random": (4, "model.safetensors: it is damaged"),
    "run flipped": (4, "model.safetensors: it is damaged"),
    "run listed": (4, "model-00001-of-00002.safetensors: the index lists this file, and it is not there"),
    "run unfetched": (4, "model.safetensors.index.json: it lists no file that is there"),
    "run named": (4, "other.safetensors: transformers_weights in config.json lists this file, and it is not there"),
    "run pointer": (4, "git lfs pull"),
    "run gptq": (5, "gptq"),
    "run model --device-map {'':0}": (5, "compute on cuda:0"),
    "serve model --device-map cuda": (5, "compute on cuda:0"),
    "chat model --max-memory {'0':8GB}": (5, "compute on cuda:0"),
    "run model --attn-implementation flash_attention_2": (2, "attn_implementation='flash_attention_2'"),
    "plan alien": (5, "'alien', which the installed transformers"),
    "run alien": (5, "'alien', which the installed transformers"),
    "plan awq": (5, "awq"),
    "pack hqq new": (5, "hqq"),
    "plan nobody/nothing": (4, "nobody/nothing"),
}


@pytest.mark.parametrize("command", BAD)
def test_one_line_and_its_exit_code(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["moe-offload", *command.split()])
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    code, says = BAD[command]
    assert ended.value.code == code and says in err, err
    assert out == "" and len(err.splitlines()) == 1 and "moe-offload" in err, err
    assert sorted(folder.iterdir()) == before, "nothing is left behind"


def test_an_index_beside_a_single_file_is_not_read(tmp_path):
    """As in transformers, which takes model.safetensors first: what an older save has left refuses nothing."""
    checkpoint(
        tmp_path / "m", json.loads((MODEL / "config.json").read_text()), (MODEL / "model.safetensors").read_bytes()
    )
    (tmp_path / "m" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    check_model(str(tmp_path / "m"))
    assert len(outline_folder(tmp_path / "m").moe_layers) == 4


#: Of these, all is known before torch is imported, which takes seconds. Not of a budget below the floor, nor of what
#: transformers cannot build: for these a model is built without weights.
NEEDS_TORCH = (
    "mistyped",
    "--budget 10",
    "--budget 3MB",
    "--attn-implementation",
    "nobody/nothing",
    "/proc/foo",
    "simulate",
    "profile record",
)
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises
from moe_offload.apps.cli import main
for command in sys.stdin.read().splitlines():
    sys.argv = ["moe-offload", *command.split()]
    try:
        main()
    except SystemExit as ended:
        print(ended.code, command)
    except ImportError as error:
        print(error, command)
"""


def test_what_is_refused_before_torch_is_imported(folder):
    commands = [command for command in BAD if not any(late in command for late in NEEDS_TORCH)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join(commands),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [f"{BAD[command][0]} {command}" for command in commands], done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file below which the disk is full")
@pytest.mark.parametrize("command", [["--help"], ["plan", str(MODEL), "--budget", "8MB"]])
def test_a_full_disk_below_standard_output_is_one_line(command):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from moe_offload.apps.cli import main; main()", *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines() == [
        "moe-offload: standard output cannot be written: No space left on device (errno 28)"
    ]


def test_the_table_of_exit_codes_is_that_of_the_code():
    page = (ROOT / "docs" / "command-line.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    classes = [one for one in vars(errors).values() if isinstance(one, type)]
    assert {exit_code(one("x")) for one in classes} | {0, 130} == listed
    told = re.findall(r"^(\d+) ", errors_page(), re.MULTILINE)
    assert sorted(map(int, told)) == sorted(listed)


def errors_page() -> str:
    from moe_offload.apps.options import ending

    return str(ending.__doc__)
