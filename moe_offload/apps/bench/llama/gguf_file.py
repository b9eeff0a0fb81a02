"""A synthetic checkpoint as the GGUF file that llama.cpp maps: the same numbers, never more than a layer in memory.

    checkpoint                              GGUF
    bf16 [O, I]                             BF16; F32 where llama.cpp wants it: vectors and routers
    experts.E.gate_proj.weight, each        ffn_gate_exps.weight [E, O, I], stacked; so up_proj and down_proj
    int4 codes [O, I/8], scales [O, G]      Q4_0: blocks of 32 with a float16 scale; the same codes, the same values
    mxfp4 codes [O, I/2], exponents [O, G]  MXFP4: blocks of 32 with an exponent; the same codes, the same values

The layout of both: a scale, then 16 bytes, of which elements 0 to 15 of a block are the low halves, 16 to 31 the high
ones. A value of Q4_0 is (code - 8) * scale. (`ggml-quants.c` of llama.cpp.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ....checkpoint.pretrained.weight_files import weight_files
from ....packed.mxfp4 import GROUP

ARCHITECTURE = {"qwen3_moe": "qwen3moe"}
FILE = "llama.cpp.gguf"
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight(_packed)?$")


class _Tensor(NamedTuple):
    """One tensor of the GGUF: its `keys` in the checkpoint (one, or one for each expert), and how it is written."""

    name: str
    keys: list[str]
    kind: Any  # a GGMLQuantizationType
    shape: tuple[int, ...]


def write_gguf(folder: Path, target: Path) -> None:
    """Write the checkpoint in `folder` to the file `target`."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(target, ARCHITECTURE[config.model_type])
    _describe(writer, config)
    with ExitStack() as opened:
        shards = [opened.enter_context(safe_open(file, "pt")) for file in weight_files(folder).files]
        owner = {key: shard for shard in shards for key in shard.keys()}
        tensors = list(_tensors(owner, config))
        for one in tensors:
            raw_shape = gguf.quant_shape_to_byte_shape(one.shape, one.kind)
            writer.add_tensor_info(one.name, raw_shape, np.dtype(np.uint8), int(np.prod(raw_shape)), one.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            parts = [_bytes_of(key, owner[key], one.kind) for key in one.keys]
            writer.write_tensor_data(np.concatenate(parts) if len(parts) > 1 else parts[0])
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _tensors(owner: dict[str, Any], config: Any) -> Iterator[_Tensor]:
    import gguf

    kinds = gguf.GGMLQuantizationType
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURE[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    experts: dict[tuple[str, str], list[str]] = {}
    for key in owner:
        found = EXPERT.match(key)
        if found:
            experts.setdefault((found[1], found[3]), []).append(key)
        elif ".mlp.experts." not in key:
            shape = tuple(owner[key].get_slice(key).get_shape())
            plain = len(shape) == 1 or key.endswith(".mlp.gate.weight")
            yield _Tensor(_name(names, key), [key], kinds.F32 if plain else kinds.BF16, shape)
    for (stem, projection), keys in experts.items():
        keys.sort(key=lambda key: int(EXPERT.match(key)[2]))  # type: ignore[index]
        outputs, inputs = owner[keys[0]].get_slice(keys[0]).get_shape()
        kind, codes = kinds.BF16, 1
        if keys[0].endswith("_packed"):
            kind, codes = (kinds.MXFP4, 2) if owner[keys[0]].get_slice(keys[0]).get_dtype() == "U8" else (kinds.Q4_0, 8)
        shape = len(keys), outputs, inputs * codes
        yield _Tensor(_name(names, f"{stem}.{projection}.weight"), keys, kind, shape)


def _name(names: Any, key: str) -> str:
    found: str = names.get_name(key, try_suffixes=(".weight",))
    return found


def _bytes_of(key: str, shard: Any, kind: Any) -> np.ndarray[Any, Any]:
    """The bytes of one tensor of the checkpoint, as `kind` writes them."""
    values: Tensor = shard.get_tensor(key)
    if kind.name in ("Q4_0", "MXFP4"):
        scales = shard.get_tensor(key.removesuffix("packed") + "scale")
        return _blocks(values, scales.half() if kind.name == "Q4_0" else scales)
    wanted = values.float() if kind.name == "F32" else values.bfloat16()
    return wanted.contiguous().view(torch.uint8).numpy().reshape(-1)


def _blocks(codes_OW: Tensor, scales_OG: Tensor) -> np.ndarray[Any, Any]:
    """Where codes lie in the checkpoint, of either format, elements 2i and 2i + 1 are the halves of byte i."""
    pairs = codes_OW.numpy().view(np.uint8).reshape(-1, GROUP // 2)
    codes = np.empty((len(pairs), GROUP), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = pairs & 15, pairs >> 4
    scales = scales_OG.numpy().reshape(-1, 1).view(np.uint8)
    return np.concatenate([scales, codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4], axis=1).reshape(-1)
