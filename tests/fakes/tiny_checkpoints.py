"""Tiny random MoE models and their checkpoints, one per way in which experts are laid out in a file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_offload.checkpoint.headers import read_headers
from moe_offload.checkpoint.pretrained.weight_files import weight_files
from moe_offload.checkpoint.row_index import RowIndex, index_rows
from moe_offload.experts import MoELayer, find_experts

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
QWEN = {**SIZES, "num_experts": 4, "moe_intermediate_size": 24}
OTHERS = {**SIZES, "num_local_experts": 4, "intermediate_size": 24}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}

#: What each stands for: its family, the names of its configuration and model classes, and its sizes.
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # one tensor per expert and projection: gate and up are joined, the three are neighbours in the file
    "per_expert": ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", QWEN),
    # the same under other names, whose order in the file is not that in the row
    "renamed": ("mixtral", "MixtralConfig", "MixtralForCausalLM", OTHERS),
    # stacked in the file as in the model, with biases
    "stacked": ("gpt_oss", "GptOssConfig", "GptOssForCausalLM", OTHERS),
    # stacked, and transposed where the checkpoint's shape is not the model's
    "transposed": (
        "qwen3_vl_moe",
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": QWEN, "vision_config": {**VISION, "deepstack_visual_indexes": [0]}},
    ),
}


def config_of(kind: str, **changes: Any) -> Any:
    family, name, _, sizes = MODELS[kind]
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    return getattr(module, name)(**{**sizes, **changes})


def build(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with the same random weights every time."""
    torch.manual_seed(0)
    model = _class(kind)._from_config(config_of(kind, **changes), dtype=dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape))
    return model.eval()


def skeleton(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    with torch.device("meta"):
        return _class(kind)._from_config(config_of(kind, **changes), dtype=dtype)


def save(model: Any, folder: Path, shard: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def index_of(model: nn.Module, folder: Path) -> tuple[list[MoELayer], RowIndex]:
    moe_layers = find_experts(model)
    index = index_rows(model, moe_layers, read_headers(weight_files(folder).files))
    return index.pack(moe_layers), index


def new_row(moe: MoELayer) -> torch.Tensor:
    return torch.full((moe.layout.row_bytes,), 0xAB, dtype=torch.uint8)


def view(row: torch.Tensor) -> memoryview:
    return row.numpy().data


def assert_row(row: torch.Tensor, moe: MoELayer, e: int) -> None:
    """`row` holds expert `e` of the layer's own parameters, bit for bit."""
    for field in moe.layout.fields:
        want = moe.params[field.name].detach()[e].contiguous().view(torch.uint8).flatten()
        assert torch.equal(row[field.offset : field.offset + field.nbytes], want), (moe.name, e, field.name)


def assert_holds(store: Any, moe_layers: list[MoELayer]) -> None:
    """Every row that `store` reads is the layer's."""
    for moe in moe_layers:
        for e in range(moe.num_experts):
            row = new_row(moe)
            assert store.read(moe.index, e, view(row)) > 0
            assert_row(row, moe, e)


def _class(kind: str) -> Any:
    family, _, name, _ = MODELS[kind]
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
