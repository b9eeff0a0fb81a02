"""Tiny random checkpoints with quantised weights, in each layout in which real ones are published.

write(KINDS["fp8"], folder)     # config.json and one safetensors file; plain transformers loads it
kind_of("MXFP8", "mixtral")  # the same for another family
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..tiny import build
from .codes import (
    BLOCK,
    Parts,
    Quantise,
    ct_mxfp4,
    fp4_dense,
    fp4_experts,
    fp8_blocks,
    fp8_channel,
    fp8_tensor,
    int4,
    mxfp8,
    to_mxfp4,
)

DENSE = ("embed_tokens", "lm_head", "norm", "router", "mlp.gate.", "block_sparse_moe.gate.", "_gate.")
BLOCKS = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
DEEPSEEK = BLOCKS | {
    "kv_lora_rank": 128, "q_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 128, "v_head_dim": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """`quantise` is for experts, `dense` for other linear layers; None leaves those as they are."""

    family: str
    sizes: Mapping[str, Any]
    quantise: Quantise
    config: Mapping[str, Any]
    dense: Quantise | None = None
    needs: str = ""


def fp8_config(**changes: Any) -> dict[str, Any]:
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    skipped = ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(2))]
    return {**said, "modules_to_not_convert": skipped, **changes}


def ct_config(form: str, activations: Mapping[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """What llm-compressor writes; attention and shared experts are left alone."""
    said = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "dynamic": False, "group_size": None}
    group = {"targets": ["Linear"], "weights": said | weights, "input_activations": activations}
    ignored = ["lm_head", "re:.*self_attn.*", "re:.*shared_expert.*", r"re:.*\.gate$"]
    ignored.append(r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignored,
    }  # fmt: skip


def _fp8(family: str, sizes: Mapping[str, Any], **changes: Any) -> Kind:
    return Kind(family, sizes, fp8_blocks, fp8_config(**changes), dense=fp8_blocks)


_E8M0 = lambda weight: fp8_blocks(weight, "e8m0")  # noqa: E731
_INT4_I32 = lambda weight: int4(weight, torch.int32)  # noqa: E731
_CT = "compressed_tensors"
_FP4 = fp8_config(scale_fmt="ue8m0", expert_dtype="fp4")
KINDS: dict[str, Kind] = {
    "mxfp4": Kind("gpt_oss", {"hidden_size": 64, "intermediate_size": 96}, ct_mxfp4, {"quant_method": "mxfp4"}),
    "fp8": _fp8("qwen3_moe", BLOCKS),
    "fp8-minimax": _fp8(
        "minimax_m2", BLOCKS | {"intermediate_size": 128},
        fmt="float8_e4m3fn", modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"],
    ),
    "fp8-deepseek": _fp8("deepseek_v3", DEEPSEEK | {"first_k_dense_replace": 1}),
    "fp8-mixtral": _fp8("mixtral", BLOCKS | {"intermediate_size": 128}, modules_to_not_convert=["gate", "lm_head"]),
    "fp8-e8m0": Kind("qwen3_moe", BLOCKS, _E8M0, fp8_config(scale_fmt="ue8m0"), dense=_E8M0),
    "fp8-tensor": Kind("qwen3_moe", BLOCKS, fp8_tensor, fp8_config(weight_block_size=None), dense=fp8_tensor),
    "mxfp8": Kind(
        "qwen3_moe", BLOCKS, mxfp8,
        fp8_config(quant_method="mxfp8", scale_fmt="ue8m0", weight_block_size=[1, 32]), dense=mxfp8,
    ),
    "fp4-experts": Kind("qwen3_moe", BLOCKS, fp4_experts, _FP4, dense=fp4_dense),
    "ct-int4": Kind("qwen3_moe", BLOCKS, int4, ct_config("pack-quantized", group_size=32), needs=_CT),
    "ct-int4-kimi": Kind(
        "deepseek_v3", DEEPSEEK | {"first_k_dense_replace": 1}, _INT4_I32,
        ct_config("pack-quantized", group_size=32), needs=_CT,
    ),
    "ct-fp8": Kind(
        "qwen3_moe", BLOCKS, fp8_channel,
        ct_config(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
            num_bits=8, type="float", strategy="channel",
        ), needs=_CT,
    ),
    "ct-mxfp4": Kind(
        "qwen3_moe", BLOCKS, ct_mxfp4, ct_config("mxfp4-pack-quantized", type="float", group_size=32), needs=_CT
    ),
}  # fmt: skip


#: What people call a format -> a kind of it, which is made for other families in the same way.
FORMATS = {
    "MXFP4": "mxfp4",
    "FP8 by block": "fp8",
    "FP8 by block, scales are powers of two (e8m0)": "fp8-e8m0",
    "FP8, one scale a tensor": "fp8-tensor",
    "MXFP8": "mxfp8",
    "FP4 experts, FP8 dense weights": "fp4-experts",
    "int4 in groups of 32": "ct-int4",
    "FP8 by channel": "ct-fp8",
    "MXFP4 of single experts": "ct-mxfp4",
}
#: Families -> sizes at which blocks of 128 divide an expert.
SIZES: dict[str, Mapping[str, Any]] = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 96},
    "qwen3_moe": BLOCKS,
    "deepseek_v3": DEEPSEEK | {"first_k_dense_replace": 1},
    "mixtral": BLOCKS | {"intermediate_size": 128},
    "minimax_m2": BLOCKS | {"intermediate_size": 128},
    "olmoe": BLOCKS | {"intermediate_size": 128},
    "qwen2_moe": BLOCKS | {"shared_expert_intermediate_size": 128},
    "glm4_moe": BLOCKS | {"first_k_dense_replace": 1},
}


def kind_of(format: str, family: str) -> Kind | None:
    """A kind of that format and family; None where transformers has no such layout: stacked experts are MXFP4 alone."""
    known = KINDS[FORMATS[format]]
    if (known.family == "gpt_oss") != (family == "gpt_oss"):
        return None
    config = dict(known.config)
    if family != known.family and "modules_to_not_convert" in config:
        config["modules_to_not_convert"] = ["gate", "shared_expert_gate", "e_score_correction_bias", "lm_head"]
    return replace(known, family=family, sizes=SIZES[family], config=config)


def write(entry: Kind, folder: Path, **sizes: Any) -> Path:
    """The checkpoint of that kind in `folder`, which is made; `sizes` are fields of the model's configuration."""
    model = build(entry.family, dtype=torch.bfloat16, **{**entry.sizes, **sizes})
    model.save_pretrained(folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        tensors.update(_quantised(entry, key, tensor))
    if entry.family == "gpt_oss":  # the two smallest exponents are legal: subnormal weights
        tensors["model.layers.0.mlp.experts.gate_up_proj_scales"][0, :2, 0] = torch.tensor([0, 1], dtype=torch.uint8)
    save(folder, tensors)
    configure(folder, quantization_config=dict(entry.config))
    return folder


def save(folder: Path, tensors: Mapping[str, Tensor], name: str = "model.safetensors") -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> Path:
    """Fields of config.json replaced; None removes one."""
    file = folder / "config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    return folder


def _quantised(entry: Kind, key: str, tensor: Tensor) -> Parts:
    if entry.family == "gpt_oss":
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {key: tensor}
        codes, scales = to_mxfp4(tensor.transpose(1, 2))
        blocks = codes.unflatten(-1, (-1, 16))
        return {f"{key}_blocks": blocks, f"{key}_scales": scales}
    linear = key.endswith(".weight") and tensor.dim() == 2 and not any(part in key for part in DENSE)
    how = entry.quantise if ".experts." in key else entry.dense
    if how is None or not linear:
        return {key: tensor}
    return {key.removesuffix("weight") + end: part for end, part in how(tensor).items()}
