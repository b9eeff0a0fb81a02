"""The architectures that `synthetic:NAME` can be: names and sizes, so a wrong one needs no torch."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError

PREFIX = "synthetic:"
#: What the configurations of these models say, as published with them; `tiny` is for tests.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss-20b": ("GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4}),
    "tiny": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 1024,
            "max_position_embeddings": 4096,
        },
    ),
}


def sizes_of(name: str, layers: int | None = None) -> tuple[str, dict[str, Any]]:
    """The class of the configuration and its sizes, in `layers` layers (all by default). Raises ConfigError."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"synthetic:{name}: no such architecture; there are {', '.join(sorted(ARCHITECTURES))}")
    class_name, sizes = ARCHITECTURES[name]
    if layers is None:
        return class_name, sizes
    if not 1 <= layers <= sizes["num_hidden_layers"]:
        raise ConfigError(f"--layers {layers}: {name} has 1 to {sizes['num_hidden_layers']} layers")
    return class_name, {**sizes, "num_hidden_layers": layers}
