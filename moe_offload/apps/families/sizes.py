"""The sizes at which a model of any MoE family is tiny, by the name of the configuration's field."""

from __future__ import annotations

from typing import Any

# The value of an override that keeps the class' own default where SIZES would change it.
DEFAULT: Any = object()

# Sizes for any configuration field of that name. Unequal where a mix-up would otherwise go unnoticed.
SIZES: dict[str, Any] = {
    # width and depth
    "vocab_size": 128,
    "unpadded_vocab_size": 120,
    "hidden_size": 64,
    "d_model": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation runs to its full length
    "tie_word_embeddings": False,  # else the best next token is the last one, whatever the experts say
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 40,
    "expert_ffn_hidden_size": 40,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_hidden_size": 48,
    "dense_intermediate_size": 48,
    "share_expert_dim": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "router_hidden_size": 16,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "attention_dropout": 0.0,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "max_window_layers": 1,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    # sparse attention
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "block_size": 8,
    # linear attention
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # state space
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "use_mamba_kernels": False,
}
