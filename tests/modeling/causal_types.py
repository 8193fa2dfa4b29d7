"""A small configuration of every causal language model that transformers lists."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROWS = 99
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Values by all the names that configurations have for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), ROWS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_head_dim", "index_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "index_topk"), 64),
    "hidden_size_per_layer_input": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ATTENTION = ("full_attention", "sliding_attention")
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "axk1": {"num_key_value_heads": 4},
    "bailing_hybrid": {"layer_group_size": 2},
    "cohere_compass_text": {
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": 1e4} for name in _ATTENTION},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_loop_text": {"unpadded_vocab_size": ROWS},
    "inkling2_text": {"unpadded_vocab_size": ROWS},
    "inkling_text": {"unpadded_vocab_size": ROWS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
    "mimo_v2_flash": {"num_key_value_heads": 2},
}


def small_config(model_type: str, **kwargs: Any) -> PreTrainedConfig:
    """Build a small configuration: set the sizes above that its class has, and `kwargs`."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    own = {**_OWN.get(model_type, {}), **kwargs}
    sizes = {name: value for name, value in _SIZES.items() if _may_be_set(default, name)}
    if "qk_rope_head_dim" in sizes:  # these follow from the others
        sizes = {name: value for name, value in sizes.items() if name not in ("head_dim", "qk_head_dim")}
    # If two names mean the same value, set the one that is saved.
    names = config_class.attribute_map
    sizes = {name: value for name, value in sizes.items() if names.get(name) not in sizes}
    return config_class(**{**sizes, **own})


def _may_be_set(config: PreTrainedConfig, name: str) -> bool:
    """Tell whether a configuration has a value of that name that is neither computed nor different for each layer."""
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return hasattr(config, name)
    except Exception:  # configurations raise different errors for values that differ by layer
        return False
