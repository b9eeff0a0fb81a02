"""Small experts modules of transformers that differ in what a pass must follow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.fakes.traced_block import Block

H, INNER, E, K = 16, 24, 8, 2


def _experts(kind: str, H: int = H, INNER: int = INNER):
    from transformers.models.aria import configuration_aria, modeling_aria
    from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
    from transformers.models.muse_spark import configuration_muse_spark, modeling_muse_spark
    from transformers.models.nemotron_h import configuration_nemotron_h, modeling_nemotron_h
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    if kind == "plain":
        config = configuration_qwen3_moe.Qwen3MoeConfig(
            hidden_size=H, moe_intermediate_size=INNER, num_experts=E, num_experts_per_tok=K
        )
        return config, modeling_qwen3_moe.Qwen3MoeExperts(config)
    if kind == "biased":  # transposed, interleaved, with biases
        config = configuration_gpt_oss.GptOssConfig(
            hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=K
        )
        return config, modeling_gpt_oss.GptOssExperts(config)
    if kind == "transposed":
        config = configuration_aria.AriaTextConfig(
            hidden_size=H, intermediate_size=INNER, moe_num_experts=E, moe_topk=K, num_attention_heads=2
        )
        return config, modeling_aria.AriaExperts(config)
    if kind == "normed":  # a norm with a weight of its own, inside the experts module
        config = configuration_muse_spark.MuseSparkTextConfig(
            hidden_size=H, moe_hidden_size=H, moe_intermediate_size=INNER, num_local_experts=E, num_attention_heads=2
        )
        return config, modeling_muse_spark.MuseSparkExperts(config)
    config = configuration_nemotron_h.NemotronHConfig(hidden_size=H, moe_intermediate_size=INNER, n_routed_experts=E)
    return config, modeling_nemotron_h.NemotronHExperts(config)


@pytest.fixture(params=["plain", "biased", "transposed", "normed", "ungated"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=["batched_mm", "grouped_mm"])
def implementation(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def block(kind: str, implementation: str, dtype: torch.dtype) -> Block:
    return make_block(kind, implementation, dtype)


def make_block(
    kind: str,
    implementation: str = "batched_mm",
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int] = (H, INNER),
) -> Block:
    torch.manual_seed(0)
    config, experts = _experts(kind, *sizes)
    experts.config = SimpleNamespace(**{**vars(config), "_experts_implementation": implementation})
    block = Block(experts, sizes[0], experts.num_experts, K).to(dtype)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p))
    return block.requires_grad_(False)


def hidden(tokens: int, dtype: torch.dtype = torch.float32, size: int = H) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).to(dtype)
