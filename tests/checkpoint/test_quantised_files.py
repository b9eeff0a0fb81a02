"""Quantised checkpoints that are damaged, mixed, or of another format than config.json says: refused by name."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3VLMoeConfig

import moe_offload
from moe_offload.apps.families.quantised.kinds import KINDS, configure, ct_config, fp8_config
from moe_offload.apps.families.session import run_session
from moe_offload.apps.families.tiny import build
from moe_offload.checkpoint.headers import read_headers
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.checkpoint.quantised import misfits
from moe_offload.checkpoint.quantised.quantizer import settle_quantization
from moe_offload.errors import CheckpointError, UnsupportedModelError
from tests.fakes import quantised_checkpoints as checkpoints
from tests.fakes.quantised_checkpoints import rewrite, split

FP8 = "model.layers.1.mlp.experts.3.up_proj.weight"  # one matrix of many
MX = "model.layers.1.mlp.experts.gate_up_proj"  # one of every expert of a layer
Q = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(kind: str, **sizes: Any) -> Path:
        key = f"{kind} {sizes}"
        if key not in made:
            made[key] = checkpoints.write(kind, tmp_path_factory.mktemp("original") / "model", **sizes)
        return made[key]

    return get


@pytest.fixture
def copy(originals, tmp_path):
    return lambda kind, **sizes: Path(shutil.copytree(originals(kind, **sizes), tmp_path / "model"))


def replaced(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def with_byte(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    """The same, its first element in every row of rows another byte."""
    changed = tensor.view(torch.uint8).clone()
    changed.view(len(changed), -1)[:, 0] = byte
    return changed.view(tensor.dtype)


def plain_experts(tensors: dict[str, torch.Tensor], which: str) -> None:
    """FP8 experts whose names have `which` in them, as bfloat16 without scales."""
    for key in [key for key in tensors if ".experts." in key and which in key and key.endswith("weight")]:
        scales = tensors.pop(f"{key}_scale_inv").repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensors[key] = (tensors[key].float() * scales).bfloat16()


def halve_scales(tensors: dict[str, torch.Tensor], which: str) -> None:
    """Scales of experts whose names have `which` in them, as bfloat16."""
    for key in [key for key in tensors if ".experts." in key and which in key and key.endswith("_scale_inv")]:
        tensors[key] = tensors[key].bfloat16()


def wider(tensors: dict[str, torch.Tensor], which: str) -> None:
    """One matrix of every expert, with its scales, twice as wide."""
    for key in [key for key in tensors if ".experts." in key and which in key]:
        tensors[key] = torch.cat([tensors[key].view(torch.uint8)] * 2, 1).view(tensors[key].dtype)


DAMAGED: dict[str, tuple[str, Change, str]] = {
    "scales missing": (
        "fp8", lambda t: t.pop(f"{FP8}_scale_inv"), r"expert 3 has no up_proj.weight_scale_inv.*model\.safetensors",
    ),
    "codes missing": ("fp8", lambda t: t.pop(FP8), r"expert 3 has no up_proj.*model\.safetensors"),
    "an expert too many": (
        "fp8", lambda t: t.update({FP8.replace(".3.", ".8."): t[FP8].clone()}), r"of 9 experts.*model\.safetensors",
    ),
    "codes of another width": (
        "fp8", lambda t: wider(t, "down_proj"), r"down_proj quantised, as \[256, 256\].*model\.safetensors",
    ),
    "stacked scales missing": ("mxfp4", lambda t: t.pop(f"{MX}_scales"), "safetensors.*gate_up_proj_blocks.*no scales"),
    "stacked codes missing": ("mxfp4", lambda t: t.pop(f"{MX}_blocks"), "safetensors.*gate_up_proj_scales.*no weights"),
    "scales of too many blocks": (
        "fp8", replaced(f"{FP8}_scale_inv", lambda s: torch.ones(3, 2)), "safetensors.*3.up_proj.weight_scale.*3, 2",
    ),
    "scales of one block": (
        "fp8", replaced(f"{FP8}_scale_inv", lambda s: torch.ones(1, 1)), "safetensors.*3.up_proj.weight_scale.*1, 1",
    ),
    "scales of another dtype": (
        "fp8", replaced(f"{FP8}_scale_inv", lambda s: s.bfloat16()), "safetensors.*3.up_proj.*another dtype",
    ),
    "scales of no such dtype": (
        "fp8", replaced(f"{FP8}_scale_inv", lambda s: s.int()), "safetensors.*3.up_proj.weight_scale.*int32",
    ),
    "stacked scales of fewer rows": (
        "mxfp4", replaced(f"{MX}_scales", lambda s: s[:, :-1]), r"safetensors.*gate_up_proj_scales.*\[191, 2\]",
    ),
    "stacked scales of fewer experts": (
        "mxfp4", replaced(f"{MX}_scales", lambda s: s[:-1]), r"gate_up_proj_scales.*\[7, 192, 2\].*model\.safetensors",
    ),
    "stacked scales of another dtype": (
        "mxfp4", replaced(f"{MX}_scales", lambda s: s.float()), "safetensors.*gate_up_proj_scales.*float32",
    ),
    "dense scales missing": ("fp8", lambda t: t.pop(f"{Q}_scale_inv"), "safetensors.*q_proj.weight.*no scales"),
    "one expert in bfloat16": (
        "fp8", lambda t: plain_experts(t, "1.mlp.experts.3."), r"expert 3 has no gate_proj.*model\.safetensors",
    ),
    "one matrix in bfloat16": (
        "fp8", lambda t: plain_experts(t, "up_proj"), r"up_proj unquantised and gate_.*model\.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damage_that_headers_show(copy, kind: str, change: Change, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        outline_folder(rewrite(copy(kind), change))


@pytest.mark.parametrize(
    ("kind", "key", "byte", "says"),
    [
        ("fp8", FP8, 0x7F, "experts expert 3: up_proj: the code of row 0, column 0 means no number"),
        ("fp8", FP8, 0xFF, "experts expert 3: up_proj: the code of row 0, column 0 means no number"),
        ("mxfp4", f"{MX}_scales", 255, "experts expert 0: gate_up_proj_blocks: the scale of row 0, group 0 is 255"),
        ("mxfp8", f"{FP8}_scale_inv", 255, "experts expert 3: up_proj: the scale at"),
    ],
)
def test_codes_that_mean_no_number_are_named(copy, kind: str, key: str, byte: int, says: str) -> None:
    folder = rewrite(copy(kind), replaced(key, lambda tensor: with_byte(tensor, byte)))
    with pytest.raises(CheckpointError, match=f"{says}.*model.safetensors"):
        moe_offload.from_pretrained(folder, "2GB").state_dict()


@pytest.mark.parametrize(
    ("kind", "key", "byte"),
    [("fp8", Q, 0x7F), ("fp8", Q, 0xFF), ("mxfp8", f"{Q}_scale_inv", 255), ("fp8-e8m0", f"{Q}_scale_inv", 255)],
)
def test_dense_codes_that_mean_no_number_are_named(copy, kind: str, key: str, byte: int) -> None:
    folder = rewrite(copy(kind), replaced(key, lambda tensor: with_byte(tensor, byte)))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{key}' at \[0, 0\] means no number"):
        moe_offload.from_pretrained(folder, "2GB")


@pytest.mark.parametrize("worth", [float("nan"), float("inf")])
def test_dense_scales_that_are_no_number_are_named(copy, worth: float) -> None:
    folder = rewrite(copy("fp8"), replaced(f"{Q}_scale_inv", lambda scales: scales * worth))
    with pytest.raises(CheckpointError, match=r"q_proj.weight_scale_inv' at \[0, 0\] means no number"):
        moe_offload.from_pretrained(folder, "2GB")


@pytest.mark.parametrize("worth", [float("nan"), float("inf")])
def test_scales_that_are_no_number_are_named(copy, worth: float) -> None:
    folder = rewrite(copy("fp8"), replaced(f"{FP8}_scale_inv", lambda scales: scales * worth))
    with pytest.raises(CheckpointError, match=r"expert 3: up_proj: the scale at \[0, 0\] is .*model.safetensors"):
        moe_offload.from_pretrained(folder, "2GB").state_dict()


def test_a_truncated_file(copy) -> None:
    file = copy("mxfp4") / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        outline_folder(file.parent)


OTHER: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "FP8 said to be MXFP4": ("fp8", {"quant_method": "mxfp4"}, "F8_E4M3 codes.*config.json says mxfp4"),
    "MXFP4 said to be FP8": ("mxfp4", fp8_config(), "quantised experts .MXFP4.*config.json says fp8"),
    "int4 said to be FP8": ("ct-int4", fp8_config(), "compressed-tensors.*config.json says fp8"),
    "groups of 32 said to be blocks": ("mxfp8", fp8_config(), r"weight_scale_inv.*blocks of \[128, 128\]"),
    "blocks said to be groups of 32": ("fp8", dict(KINDS["mxfp8"].config), r"weight_scale_inv.*blocks of \[1, 32\]"),
    "FP8 said to be nothing": ("fp8", None, "F8_E4M3 codes.*names no format"),
    "MXFP4 said to be nothing": ("mxfp4", None, "MXFP4.*names no format"),
    "int4 said to be nothing": ("ct-int4", None, "compressed-tensors.*names no format"),
    "FP4 said to be nothing": ("fp4-experts", None, "I8 codes.*names no format"),
}


@pytest.mark.parametrize(("kind", "said", "says"), OTHER.values(), ids=OTHER)
def test_files_of_another_format_than_config_json_says(copy, kind: str, said: Any, says: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=f"model.safetensors.*{says}"):
        outline_folder(configure(copy(kind), quantization_config=said))


def test_dense_codes_without_a_format_are_no_weights(copy) -> None:
    folder = configure(rewrite(copy("fp8"), lambda t: plain_experts(t, "")), quantization_config=None)
    with pytest.raises(UnsupportedModelError, match=r"self_attn.*F8_E4M3.*names no format"):
        outline_folder(folder)


REFUSED: dict[str, dict[str, Any]] = {
    **{
        method: {"quant_method": method} for method in ("gptq", "awq", "nvfp4", "hqq", "quanto", "torchao", "brand-new")
    },
    "NVFP4": ct_config("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
    "asymmetric": ct_config("pack-quantized", symmetric=False, group_size=32),
    "by block": ct_config("float-quantized", num_bits=8, type="float", strategy="block"),
    "8-bit int": ct_config("int-quantized", num_bits=8, strategy="channel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_are_refused_by_what_config_json_says(copy, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name}.*Instead, use a checkpoint in MXFP4"):
        outline_folder(configure(copy("fp8"), quantization_config=REFUSED[name]))


def test_what_the_text_part_says_counts(copy) -> None:
    said = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UnsupportedModelError, match=r"gptq; text_config\.quantization_config"):
        outline_folder(configure(copy("fp8"), quantization_config=None, text_config=said))


def test_what_the_text_part_says_is_put_where_transformers_looks() -> None:
    config = Qwen3VLMoeConfig(text_config={"quantization_config": fp8_config()})
    settle_quantization(config)
    assert config.quantization_config == {**fp8_config(), "dequantize": True}


def _bitsandbytes(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".experts." in key]:
        tensors |= {f"{key}.absmax": torch.ones(4), key: torch.zeros(16, 1, dtype=torch.uint8)}


def _gptq(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key.removesuffix("weight") + "qweight"] = tensors.pop(key).int()


def _torchao(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key.removesuffix("weight") + "_weight_qdata"] = tensors.pop(key).to(torch.int8)


@pytest.mark.parametrize(
    ("change", "says"),
    [(_bitsandbytes, "U8 codes of bitsandbytes"), (_gptq, "GPTQ or AWQ"), (_torchao, "torchao")],
    ids=["bitsandbytes", "gptq", "torchao"],
)
def test_experts_that_carry_the_marks_of_a_method_of_dense_layers(copy, change: Change, says: str) -> None:
    folder = rewrite(copy("fp8"), lambda tensors: plain_experts(tensors, ""))
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("_scale_inv")])
    rewrite(folder, change)
    with pytest.raises(UnsupportedModelError, match=f"model.safetensors.*experts.*{says}"):
        outline_folder(configure(folder, quantization_config=None))


@pytest.mark.parametrize("inner", [192, 200])
def test_experts_in_uneven_blocks(copy, inner: int) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"model.safetensors.*experts.*{inner}\].*the last of them short"):
        outline_folder(copy("fp8", moe_intermediate_size=inner))


def test_dense_weights_that_transformers_would_cut_into_other_blocks(copy) -> None:
    with pytest.raises(UnsupportedModelError, match=r"o_proj.*loads other weights than were saved"):
        outline_folder(copy("fp8", num_attention_heads=12, head_dim=16))


def test_dense_weights_in_uneven_blocks_are_what_the_format_says(copy, caplog) -> None:
    """576 rows of kv_a_proj_with_mqa, as in DeepSeek-V3: transformers cannot load them without a GPU."""
    folder = copy("fp8-deepseek", kv_lora_rank=512, qk_rope_head_dim=64)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(folder)
    key, tensors = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", checkpoints.tensors_of(folder)
    scales = tensors[f"{key}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:576]
    found = moe_offload.from_pretrained(folder, "2GB").state_dict()
    assert torch.equal(found[key], (tensors[key].float() * scales).bfloat16())
    assert "short last block" in caplog.text


def hash_of(key: str) -> int:
    return zlib.crc32(key.encode())


def assert_as_plain(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
    ours = moe_offload.from_pretrained(folder, "2GB", config={"compile": "graph", "poison": True})
    for theirs, found in zip(
        run_session(plain, "lm", new_tokens=3), run_session(ours, "lm", new_tokens=3), strict=True
    ):
        assert torch.equal(found, theirs)
    ours.moe_offload.close()


SOUND: dict[str, Callable[[Path], object]] = {
    "scales in another shard": lambda folder: split(folder, lambda key: key.endswith("_scale_inv")),
    "codes and scales strewn over shards": lambda folder: split(folder, lambda key: hash_of(key) % 2 == 0),
    # Two layers whose rows are of different kinds may not share a graph: one would be read as the other.
    "second layer in bfloat16": lambda folder: rewrite(folder, lambda t: plain_experts(t, "layers.1.")),
    "first layer in bfloat16": lambda folder: rewrite(folder, lambda t: plain_experts(t, "layers.0.")),
    "scales of another dtype in one layer": lambda folder: rewrite(folder, lambda t: halve_scales(t, "layers.1.")),
    "all experts in bfloat16": lambda folder: rewrite(folder, lambda t: plain_experts(t, "")),
}


def test_bitsandbytes_of_dense_layers_is_plain_transformers_business(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
    build("qwen3_moe", dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path / "plain")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=four_bits)
    model.save_pretrained(tmp_path / "quantised")
    assert any(key.endswith(".absmax") for key in checkpoints.tensors_of(tmp_path / "quantised"))
    assert_as_plain(tmp_path / "quantised")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_plain_files_that_config_json_says_are_of_bitsandbytes(tmp_path, bits: str) -> None:
    """transformers loads them; the first call then fails on an assertion of that package."""
    pytest.importorskip("bitsandbytes")
    build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=2).save_pretrained(tmp_path)
    configure(tmp_path, quantization_config={"quant_method": "bitsandbytes", f"load_in_{bits}": True})
    with pytest.raises(CheckpointError, match=r"model.safetensors: 'model.layers.0.self_attn.q_proj.weight' is BF16"):
        moe_offload.from_pretrained(tmp_path, "2GB")


@pytest.mark.parametrize(("kind", "mark"), misfits.CODES_OF.items())
def test_a_module_of_bitsandbytes_wants_what_belongs_to_its_codes(tmp_path, kind: str, mark: str) -> None:
    """As above, without the package."""
    model: Any = build("qwen3_moe", num_hidden_layers=1)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    model.model.layers[0].self_attn.o_proj = type(kind, (torch.nn.Linear,), {})(64, 64)
    weight = "model.layers.0.self_attn.o_proj.weight"
    beside = f"model.layers.0.self_attn.o_proj.{mark}"
    save_file({weight: torch.ones(4, 4), beside: torch.ones(4)}, tmp_path / "whole.safetensors")
    misfits.check_dense(model, read_headers([tmp_path / "whole.safetensors"]), ())
    save_file({weight: torch.ones(4, 4)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=rf"plain.safetensors: '{weight}' is F32 .*{mark}.*says bitsandbytes"):
        misfits.check_dense(model, read_headers([tmp_path / "plain.safetensors"]), ())


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_what_looks_odd_and_is_sound(copy, change: Callable[[Path], object]) -> None:
    folder = copy("fp8")
    change(folder)
    assert_as_plain(folder)
