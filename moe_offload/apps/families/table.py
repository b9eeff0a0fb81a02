"""Every MoE family in transformers, and what makes a model of it tiny beyond the sizes that all share (`sizes.py`).

One entry per model class that has routed experts of its own, whether or not moe_offload can run it. Only this table
knows the families; `tiny.py` builds them alike.
"""

from __future__ import annotations

from typing import Any

from .family import Family, causal_lm, encoder_decoder, no_cache, text_lm, text_model
from .sizes import DEFAULT

MHA: dict[str, Any] = {"num_key_value_heads": 4}  # as many key heads as query heads
DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
LINEAR_FULL_LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}


def make_rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


FAMILIES: dict[str, Family] = {
    "afmoe": causal_lm("afmoe", "Afmoe", num_hidden_layers=4),
    "aria": Family("aria", "AriaTextConfig", "AriaTextForCausalLM", "lm", {}),
    "axk1": causal_lm("axk1", "AXK1", **MHA),
    "axk2": causal_lm("axk2", "AXK2", **MHA, head_dim=DEFAULT),
    "bailing_hybrid": causal_lm("bailing_hybrid", "BailingHybrid", **MHA, layer_group_size=2),
    "beam": causal_lm("beam", "Beam", **DENSE_FIRST),
    "cohere2_moe": causal_lm("cohere2_moe", "Cohere2Moe"),
    "dbrx": causal_lm(
        "dbrx",
        "Dbrx",
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    ),
    "deepseek_ocr2": text_model("deepseek_ocr2", "DeepseekOcr2", **DENSE_FIRST, n_group=DEFAULT, topk_group=DEFAULT),
    "deepseek_v2": causal_lm("deepseek_v2", "DeepseekV2", **MHA, topk_method="group_limited_greedy"),
    "deepseek_v3": causal_lm("deepseek_v3", "DeepseekV3", **MHA),
    "deepseek_v32": causal_lm("deepseek_v32", "DeepseekV32", **MHA),
    "deepseek_v4": causal_lm(
        "deepseek_v4", "DeepseekV4", "StaticCache has no layer for its compressed attention", num_key_value_heads=1
    ),
    "diffusion_gemma": Family(
        "diffusion_gemma",
        "DiffusionGemmaTextConfig",
        "DiffusionGemmaEncoderTextModel",
        "lm",
        {"top_k_experts": 2, "global_head_dim": 16},
    ),
    "doge": causal_lm("doge", "Doge", is_moe=True, num_experts=16),
    "dots1": causal_lm("dots1", "Dots1", **MHA),
    "dots3_note": text_lm(
        "dots3_note",
        "Dots3Note",
        **MHA,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_v_head_dim=16,
        swa_qk_nope_head_dim=8,
    ),
    "dots3_note_vision": no_cache(
        "dots3_note",
        "Dots3NoteVisionConfig",
        "Dots3NoteVisionModel",
        "vision_grid",
        pyramid_num_routed=[-1, 4, 8],
        num_local_experts=DEFAULT,
        adapter_in_dim=64,
        adapter_out_dim=64,
    ),
    "ernie4_5_moe": causal_lm("ernie4_5_moe", "Ernie4_5_Moe"),
    "ernie4_5_vl_moe": text_model(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoe", moe_intermediate_size=[40, 24], **make_rope(mrope_section=[3, 3, 2])
    ),
    "exaone_moe": causal_lm("exaone_moe", "ExaoneMoe"),
    "flex_olmo": causal_lm("flex_olmo", "FlexOlmo"),
    "flint": causal_lm("flint", "Flint"),
    "gemma4": text_lm(
        "gemma4", "Gemma4", enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=0, global_head_dim=16
    ),
    "glm4_moe": causal_lm("glm4_moe", "Glm4Moe"),
    "glm4_moe_lite": causal_lm("glm4_moe_lite", "Glm4MoeLite", **MHA),
    "glm4v_moe": text_model("glm4v_moe", "Glm4vMoe", **make_rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1])),
    "glm5_next": text_model(
        "glm5_next",
        "Glm5Next",
        **MHA,
        **LINEAR_FULL_LINEAR,
        **DENSE_FIRST,
        index_kpool=4,
        indexer_types=["full", "full", "full"],
        qk_rope_head_dim=DEFAULT,
        head_dim=DEFAULT,
    ),
    "glm_moe_dsa": causal_lm("glm_moe_dsa", "GlmMoeDsa", **MHA),
    "gpt_oss": causal_lm("gpt_oss", "GptOss"),
    "granitemoe": causal_lm("granitemoe", "GraniteMoe"),
    "granitemoe_swa": causal_lm("granitemoe_swa", "GraniteMoeSWA"),
    "granitemoehybrid": causal_lm("granitemoehybrid", "GraniteMoeHybrid", layer_types=["mamba", "attention", "mamba"]),
    "granitemoeshared": causal_lm("granitemoeshared", "GraniteMoeShared"),
    "hunyuan_v1_moe": causal_lm("hunyuan_v1_moe", "HunYuanMoEV1"),
    "hy_v3": causal_lm("hy_v3", "HYV3"),
    "hy_v4": causal_lm("hy_v4", "HYV4", **MHA),
    "hy_v4_vl": text_model("hy_v4_vl", "HYV4VL", **MHA, **make_rope(mrope_section=[2, 1, 1])),
    "inkling": text_lm("inkling", "Inkling"),
    "inkling2": text_lm("inkling2", "Inkling2"),
    "inkling2_loop": text_lm(  # its middle layers are called twice in each forward, their experts too
        "inkling2_loop",
        "Inkling2Loop",
        num_hidden_layers=6,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        n_layers_per_attn_res_block=2,
        loop_layer_index_start=2,
        loop_layer_index_end=4,
        loop_num_passes=2,
        loop_gate_rank=8,
    ),
    "jamba": causal_lm(
        "jamba",
        "Jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "jetmoe": causal_lm("jetmoe", "JetMoe"),
    "kimi_linear": causal_lm("kimi_linear", "KimiLinear", **MHA, **LINEAR_FULL_LINEAR, **DENSE_FIRST),
    "kolibri1": causal_lm("kolibri1", "Kolibri1"),
    "laguna": causal_lm("laguna", "Laguna"),
    "lara_mini": causal_lm("lara_mini", "LaraMini", num_hidden_layers=4),
    "lfm2_moe": causal_lm("lfm2_moe", "Lfm2Moe", layer_types=["conv", "full_attention", "conv"]),
    "llama4": text_lm("llama4", "Llama4", num_experts_per_tok=1),
    "longcat_flash": causal_lm(
        "longcat_flash", "LongcatFlash", **MHA, num_layers=2, zero_expert_num=4, head_dim=8, qk_head_dim=DEFAULT
    ),
    "mellum": causal_lm("mellum", "Mellum"),
    "mimo_v2_flash": causal_lm("mimo_v2_flash", "MiMoV2Flash"),
    "minimax": causal_lm("minimax", "MiniMax", "it takes no cache but one of its own class"),
    "minimax_m2": causal_lm("minimax_m2", "MiniMaxM2"),
    "minimax_m3_vl": text_lm("minimax_m3_vl", "MiniMaxM3VL"),
    "mistral4": causal_lm("mistral4", "Mistral4", **MHA),
    "mistral_large4": text_model("mistral_large4", "MistralLarge4", **MHA),
    "mixtral": causal_lm("mixtral", "Mixtral"),
    "muse_spark": text_model("muse_spark", "MuseSpark", moe_hidden_size=32),
    "nemotron_h": causal_lm(
        "nemotron_h",
        "NemotronH",
        layers_block_type=["mamba", "moe", "attention", "moe"],
        num_hidden_layers=DEFAULT,
    ),
    "nllb_moe": encoder_decoder(
        "nllb_moe",
        "NllbMoe",
        encoder_layers=2,
        decoder_layers=2,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        expert_capacity=64,
        dropout=0.0,
    ),
    "olmoe": causal_lm("olmoe", "Olmoe"),
    "openai_privacy_filter": no_cache(
        "openai_privacy_filter", "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification", "encoder"
    ),
    "phimoe": causal_lm("phimoe", "Phimoe"),
    "qwen2_moe": causal_lm("qwen2_moe", "Qwen2Moe"),
    "qwen3_5_moe": text_lm("qwen3_5_moe", "Qwen3_5Moe", **LINEAR_FULL_LINEAR),
    "qwen3_moe": causal_lm("qwen3_moe", "Qwen3Moe"),
    "qwen3_next": causal_lm("qwen3_next", "Qwen3Next", **LINEAR_FULL_LINEAR),
    "qwen3_omni_moe_talker": Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerTextConfig",
        "Qwen3OmniMoeTalkerModel",
        "embeds",
        {"shared_expert_intermediate_size": 32},
    ),
    "qwen3_omni_moe_thinker": Family(
        "qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel", "lm", {}
    ),
    "qwen3_vl_moe": text_model("qwen3_vl_moe", "Qwen3VLMoe"),
    "qwen4_exp": text_lm(
        "qwen4_exp",
        "Qwen4Exp",
        **LINEAR_FULL_LINEAR,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=4,
        hc_lowrank=8,
    ),
    "solar_open": causal_lm("solar_open", "SolarOpen"),
    "step3p7": text_model("step3p7", "Step3p7", **DENSE_FIRST),
    "switch_transformers": encoder_decoder(
        "switch_transformers",
        "SwitchTransformers",
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        d_kv=16,
        d_ff=48,
        expert_capacity=64,
        dropout_rate=0.0,
    ),
    "unlimited_ocr": text_model("unlimited_ocr", "UnlimitedOcr", n_group=DEFAULT, topk_group=DEFAULT),
    "vitpose_backbone": no_cache(
        "vitpose_backbone",
        "VitPoseBackboneConfig",
        "VitPoseBackbone",
        "vitpose",
        num_hidden_layers=2,
        num_experts=4,
        part_features=16,
        image_size=(32, 32),
        patch_size=(8, 8),
    ),
    "zaya": causal_lm("zaya", "Zaya", num_experts_per_tok=1),
}
