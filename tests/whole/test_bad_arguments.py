"""What people get wrong in Python: each is one line that says what is wrong, of the class of its kind, at once.

At a shell: tests/apps/cli/test_bad_inputs.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moe_offload
from moe_offload import Profile, Trace
from moe_offload.errors import OffloadError
from tests.paths import MODEL

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "alien": {"model_type": "alien", "architectures": ["AlienForCausalLM"]},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "mistyped": {"num_hidden_layers": "two"},
    "misfit": {"vocab_size": 7},
    "flat": {"hidden_size": 0},
    "thin": {"moe_intermediate_size": 0},
    "negative": {"hidden_size": -4},
    "unknown gate": {"hidden_act": "nope"},
    "numbered": {"architectures": -1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that is named below."""
    made = tmp_path_factory.mktemp("bad")
    config = json.loads((MODEL / "config.json").read_text())
    weights = (MODEL / "model.safetensors").read_bytes()
    for name, changes in CHECKPOINTS.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps({**config, **changes}))
        (made / name / "model.safetensors").write_bytes(weights)
    for name, damaged in {"truncated": weights[:-1000], "hollow": b""}.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(config))
        (made / name / "model.safetensors").write_bytes(damaged)
    (made / "model").symlink_to(MODEL)
    (made / "nothing").mkdir()
    for name in ("hollow.json", "hollow.gguf"):
        (made / name).touch()
    for name, text in {"a list": "[]", "deep": "[" * 200_000}.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(text)
        (made / name / "model.safetensors").write_bytes(weights)
    (made / "bad.yaml").write_text("budget: [8GB")
    (made / "unknown.yaml").write_text("budgte: 8GB")
    return made


#: What is given to from_pretrained("model", "8GB", ...), the class of the error, and what it says.
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"budget": 0}, "ConfigError", "hold nothing"),
    ({"budget": -1}, "ConfigError", "not negative"),
    ({"budget": ""}, "ConfigError", "it is empty"),
    ({"budget": "120%"}, "ConfigError", "100% at most"),
    ({"budget": "1e400GB"}, "ConfigError", "more than 2**63"),
    ({"budget": "banana"}, "ConfigError", "does not begin with a number"),
    ({"budget": True}, "ConfigError", "a bool is not a size"),
    ({"budget": float("nan")}, "ConfigError", "a float is not a size"),
    ({"budget": b"8GB"}, "ConfigError", "a bytes is not a size"),
    ({"budget": 10}, "BudgetError", "below the floor"),
    ({"budget": "3MB"}, "BudgetError", "below the floor"),
    ({"config": {"policy": "foo"}}, "ConfigError", "policy='foo'"),
    ({"config": {"half_life": -1}}, "ConfigError", "half_life=-1"),
    ({"config": {"compile": "foo"}}, "ConfigError", "compile='foo'"),
    ({"config": {"compute": "foo"}}, "ConfigError", "compute='foo'"),
    ({"config": {"kv_tokens": -1}}, "ConfigError", "kv_tokens=-1"),
    ({"config": {"reserve": "banana"}}, "ConfigError", "reserve='banana'"),
    ({"config": {"wave_rows": -2}}, "ConfigError", "wave_rows=-2"),
    ({"config": {"lookahead": "yes"}}, "ConfigError", "lookahead='yes'"),
    ({"config": {"decide": "moon"}}, "ConfigError", "decide='moon'"),
    ({"config": {"lock_memory": "maybe"}}, "ConfigError", "lock_memory='maybe'"),
    ({"config": {"budgte": 1}}, "ConfigError", "did you mean 'budget'?"),
    ({"config": "nowhere.yaml"}, "ConfigError", "nowhere.yaml"),
    ({"config": "bad.yaml"}, "ConfigError", "bad.yaml"),
    ({"config": "unknown.yaml"}, "ConfigError", "did you mean 'budget'?"),
    ({"config": ""}, "ConfigError", "config='' is not accepted"),
    ({"config": 3}, "ConfigError", "takes an OffloadConfig"),
    ({"path_or_id": "./nowhere"}, "CheckpointError", "nothing there"),
    ({"path_or_id": "nothing"}, "CheckpointError", "no config.json"),
    ({"path_or_id": "hollow.gguf"}, "CheckpointError", "GGUF"),
    ({"path_or_id": "qwen3:30b"}, "CheckpointError", "no Hub repository can have it"),
    ({"path_or_id": "nobody/nothing"}, "CheckpointError", "nobody/nothing"),
    ({"path_or_id": ""}, "CheckpointError", "the path of the checkpoint is empty"),
    ({"path_or_id": 3}, "CheckpointError", "found int"),
    ({"path_or_id": None}, "CheckpointError", "found NoneType"),
    ({"path_or_id": "truncated"}, "CheckpointError", "model.safetensors"),
    ({"path_or_id": "hollow"}, "CheckpointError", "model.safetensors"),
    ({"path_or_id": "mistyped"}, "CheckpointError", "num_hidden_layers"),
    ({"path_or_id": "misfit"}, "CheckpointError", "is [4096, 128] in the checkpoint, and [7, 128] by its config.json"),
    ({"path_or_id": "flat"}, "UnsupportedModelError", "which holds no number"),
    ({"path_or_id": "thin"}, "UnsupportedModelError", "which holds no number"),
    ({"path_or_id": "negative"}, "UnsupportedModelError", "negative dimension -4"),
    ({"path_or_id": "unknown gate"}, "UnsupportedModelError", "'nope'"),
    ({"path_or_id": "numbered"}, "CheckpointError", "-1 as architectures"),
    ({"path_or_id": "a list"}, "CheckpointError", "cannot read the model's configuration: AttributeError"),
    ({"path_or_id": "deep"}, "CheckpointError", "cannot read the model's configuration: RecursionError"),
    ({"path_or_id": "alien"}, "UnsupportedModelError", "'alien'"),
    ({"path_or_id": "gptq"}, "UnsupportedModelError", "gptq"),
    ({"device_map": "banana"}, "ConfigError", "'banana' is no device"),
    ({"device_map": {"nosuch.layer": "cpu"}}, "ConfigError", "names no module"),
    ({"device_map": {"": 0}}, "UnsupportedModelError", "compute on cuda:0"),
    ({"device_map": 5}, "ConfigError", "no mapping"),
    ({"max_memory": "8GB"}, "ConfigError", "no mapping"),
    ({"max_memory": {"cpu": "banana"}}, "ConfigError", "of 'cpu'"),
    ({"profile": "hollow.json"}, "ProfileError", "it is empty"),
    ({"profile": "nowhere.json"}, "ProfileError", "nowhere.json"),
    ({"profile": "model/config.json"}, "ProfileError", "it is the configuration of a model"),
    ({"profile": "./nothing"}, "ProfileError", "not a regular file"),
    ({"dtype": "banana"}, "ConfigError", "no torch dtype"),
    ({"torch_dtype": "float99"}, "ConfigError", "no torch dtype"),
    ({"subfolder": "none"}, "CheckpointError", "no config.json"),
    ({"variant": "fp16"}, "CheckpointError", "model.fp16.safetensors"),
    ({"gguf_file": "x.gguf"}, "ConfigError", "GGUF files are not read"),
    ({"state_dict": {}}, "ConfigError", "state_dict"),
    ({"load_in_4bit": True}, "UnsupportedModelError", "load_in_4bit"),
    ({"attn_implementation": "flash_attention_2"}, "ConfigError", "flash_attention_2"),
    ({"use_safetensors": False}, "ConfigError", "pickle"),
    ({"trust_remote_code": "no"}, "ConfigError", "trust_remote_code='no' is neither True nor False"),
    ({"nosuch_argument": 1}, "ConfigError", "nosuch_argument"),
    ({"num_experts_per_tok": 99}, "BudgetError", "below the floor"),
]


@pytest.mark.parametrize(("given", "kind", "says"), BAD, ids=lambda value: str(value)[:50])
def test_from_pretrained_says_in_one_line_what_is_wrong(given, kind, says, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OffloadError) as error:
        moe_offload.from_pretrained(**{"path_or_id": "model", "budget": "8MB", **given})
    assert type(error.value).__name__ == kind and says in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 450


def test_what_is_no_model_with_experts_is_named():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    for given, says in (
        (None, "found NoneType; from_pretrained"),
        ("Qwen/Qwen3-30B-A3B", "found str; from_pretrained"),
        (torch.nn.Linear(2, 2), "Linear has no routed experts"),
        (dense, "LlamaForCausalLM has no routed experts"),
    ):
        with pytest.raises(OffloadError, match=says):
            moe_offload.optimize(given, "8GB")


def test_files_that_are_none_are_named(folder):
    for use in (
        lambda: Profile.load(folder / "hollow.json"),
        lambda: Profile.load(folder / "nowhere.json"),
        lambda: Trace.load(folder / "hollow.json"),
        lambda: moe_offload.pack_checkpoint(MODEL, folder),
        lambda: moe_offload.pack_checkpoint(MODEL, ""),
        lambda: moe_offload.quantise_checkpoint(MODEL, "", "fp8"),
        lambda: moe_offload.make_plan(MODEL, "10"),
        lambda: moe_offload.forecast(MODEL, "banana"),
        lambda: moe_offload.forecast(MODEL, "8MB", trust_remote_code="no"),
    ):
        with pytest.raises(OffloadError) as error:
            use()
        assert "\n" not in str(error.value)
