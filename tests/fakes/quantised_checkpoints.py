"""Tiny random checkpoints with quantised weights, in each layout in which real ones are published.

    write("fp8", folder)                        # config.json and one safetensors file; plain transformers loads it
    rewrite(folder, lambda tensors: ...)        # the same with other tensors
    configure(folder, quantization_config=...)  # the same with another config.json

Rounding is crude: which weights come out is of no matter, only what reading them gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_offload.apps.families.tiny import build

Parts = dict[str, Tensor]  # what stands in the file for X.weight: the end of its name -> tensor
Quantise = Callable[[Tensor], Parts]

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 128
DENSE = ("embed_tokens", "lm_head", "norm", "router", "mlp.gate.", "block_sparse_moe.gate.")
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


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., O, I] -> codes uint8 [..., O, I/2], the first of a pair low, and exponents uint8 [..., O, I/32]."""
    groups = weight.float().unflatten(-1, (-1, 32))
    power = (groups.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2).clamp(-127, 127)
    codes = (groups / power.exp2()[..., None])[..., None].sub(FP4).abs().argmin(-1).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (power + 127).to(torch.uint8)


def fp8_blocks(weight: Tensor, scale: str = "float32") -> Parts:
    rows, columns = weight.shape
    grid = [(n + BLOCK - 1) // BLOCK for n in weight.shape]
    grown = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
    grown[:rows, :columns] = weight.float()
    blocks = grown.view(grid[0], BLOCK, grid[1], BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    if scale != "float32":
        scales = scales.log2().ceil().exp2()
    codes = (blocks / scales[:, None, :, None]).view_as(grown)[:rows, :columns].to(torch.float8_e4m3fn)
    kept = {"float32": scales, "e8m0": scales.to(torch.float8_e8m0fnu)}[scale]
    return {"weight": codes, "weight_scale_inv": kept}


def fp8_tensor(weight: Tensor) -> Parts:
    scale = weight.float().abs().max() / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def mxfp8(weight: Tensor) -> Parts:
    groups = weight.float().unflatten(-1, (-1, 32))
    power = (groups.abs().amax(-1) / 448).log2().ceil().clamp(-127, 127)
    codes = (groups / power.exp2()[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return {"weight": codes, "weight_scale_inv": (power + 127).to(torch.uint8)}


def fp4_experts(weight: Tensor) -> Parts:
    """As DeepSeek-V4 has them: scales are called X.scale, not X.weight_scale_inv."""
    codes, scales = to_mxfp4(weight)
    return {"weight": codes.view(torch.int8), "scale": scales.view(torch.float8_e8m0fnu)}


def fp4_dense(weight: Tensor) -> Parts:
    parts = fp8_blocks(weight, "e8m0")
    return {"weight": parts["weight"], "scale": parts["weight_scale_inv"]}


def int4(weight: Tensor, shape_dtype: torch.dtype = torch.int64) -> Parts:
    groups = weight.float().unflatten(-1, (-1, 32))
    scales = (groups.abs().amax(-1) / 7.5).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).int().flatten(-2) + 8
    words = (codes.unflatten(-1, (-1, 8)) << (4 * torch.arange(8, dtype=torch.int32))).sum(-1).to(torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape, dtype=shape_dtype),
    }


def fp8_channel(weight: Tensor) -> Parts:
    scale = (weight.float().abs().amax(-1, keepdim=True) / 448).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}


def ct_mxfp4(weight: Tensor) -> Parts:
    codes, scales = to_mxfp4(weight)
    return {"weight_packed": codes, "weight_scale": scales}


def fp8_config(**changes: Any) -> dict[str, Any]:
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    skipped = ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(2))]
    return {**said, "modules_to_not_convert": skipped, **changes}


def ct_config(form: str, activations: Mapping[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """What llm-compressor writes; attention and shared experts are left alone."""
    said = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "dynamic": False, "group_size": None}
    group = {"targets": ["Linear"], "weights": said | weights, "input_activations": activations}
    ignored = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.gate$"]
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


def write(kind: str, folder: Path, shard: str = "1GB", **sizes: Any) -> Path:
    """The checkpoint of that kind in `folder`, which is made; `sizes` are fields of the model's configuration."""
    entry = KINDS[kind]
    model = build(entry.family, dtype=torch.bfloat16, **{**entry.sizes, **sizes})
    model.save_pretrained(folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        tensors.update(_quantised(entry, key, tensor))
    if kind == "mxfp4":  # the two smallest exponents are legal: subnormal weights
        tensors["model.layers.0.mlp.experts.gate_up_proj_scales"][0, :2, 0] = torch.tensor([0, 1], dtype=torch.uint8)
    save(folder, tensors)
    configure(folder, quantization_config=dict(entry.config))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def save(folder: Path, tensors: Mapping[str, Tensor], name: str = "model.safetensors") -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = tensors_of(folder)
    change(tensors)
    save(folder, tensors)
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    """Fields of config.json replaced; None removes one."""
    file = folder / "config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    return folder


def split(folder: Path, second: Callable[[str], bool]) -> Path:
    """The same in two shards: tensors whose name is `second` lie in the second."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{2 if second(key) else 1}-of-00002.safetensors" for key in tensors}
    for name in set(where.values()):
        save(folder, {key: tensor for key, tensor in tensors.items() if where[key] == name}, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
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
