"""Small shapes of every model type that the tests build, as fields of its configuration."""

from typing import Any

CONTEXT = 256
"""Positions of every tiny model."""

_LLAMA = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": CONTEXT,
}
# Heads wider than hidden / heads, as these models have: code that divides instead of asking is wrong on them.
_WIDE_HEADS = {"head_dim": 16}
_GPT = {"n_embd": 32, "n_head": 4, "n_inner": 80, "n_positions": CONTEXT}

_TABLE: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 8},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _WIDE_HEADS,
    # Caps near the size of the tiny logits, so that capping is felt.
    "gemma2": _LLAMA
    | _WIDE_HEADS
    | {
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3": _LLAMA | _WIDE_HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": _LLAMA,
    "opt": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_dim": 80,
        "max_position_embeddings": CONTEXT,
        "init_std": 0.2,
    },
    "bloom": {"hidden_size": 32, "n_head": 4},  # its intermediate size is always 4 * hidden
    "falcon": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 80,
        "max_position_embeddings": CONTEXT,
    },
    "olmo2": _LLAMA,
}

_HEADS = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_SLIDING = {"sliding_window": 8}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_GRANITE = {
    "residual_multiplier": 0.22,
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "attention_multiplier": 0.2,
}

_FOUND: dict[str, dict[str, Any]] = {
    "apertus": _LLAMA,
    "arcee": _LLAMA,
    "bamba": _LLAMA | _MAMBA | {"attn_layer_indices": [1, 3]},
    "biogpt": _HEADS,
    "bitnet": _LLAMA,
    "codegen": _GPT | {"rotary_dim": 4},
    "cohere": _LLAMA | {"logit_scale": 0.3},
    "cohere2": _LLAMA | _SLIDING | {"logit_scale": 0.3},
    "ctrl": {"n_embd": 32, "n_head": 4, "dff": 80, "n_positions": CONTEXT},
    "cwm": _LLAMA | _SLIDING,
    "diffllama": _LLAMA,
    "doge": _LLAMA,
    "ernie4_5": _LLAMA | _WIDE_HEADS,
    "exaone4": _LLAMA | _SLIDING | {"sliding_window_pattern": 2},
    "falcon_h1": _LLAMA
    | _WIDE_HEADS
    | _MAMBA
    | {"mamba_d_ssm": 64, "mlp_multipliers": [0.7, 0.4], "lm_head_multiplier": 0.5, "key_multiplier": 0.8},
    "gemma": _LLAMA | _WIDE_HEADS,
    "gemma3_with_vision": _LLAMA | _WIDE_HEADS | _SLIDING | {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "gemma4_text": _LLAMA
    | _WIDE_HEADS
    | _SLIDING
    | {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0},
    "gemma4_unified_text": _LLAMA | _WIDE_HEADS | _SLIDING | {"global_head_dim": 16},
    "glm": _LLAMA | _WIDE_HEADS,
    "glm4": _LLAMA | _WIDE_HEADS,
    "got_ocr2": _LLAMA,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": CONTEXT,
        "window_size": 8,
        "attention_types": [[["global", "local"], 2]],
    },
    "gpt_neox_japanese": _HEADS,
    "granite": _LLAMA | _GRANITE,
    "granite_swa": _LLAMA | _GRANITE | _SLIDING,
    "granitemoehybrid": _LLAMA
    | _GRANITE
    | _MAMBA
    | {"num_local_experts": 0, "shared_intermediate_size": 80, "layer_types": ["attention", "mamba"] * 2},
    "helium": _LLAMA | {"head_dim": 8},
    "hunyuan_v1_dense": _LLAMA | _WIDE_HEADS,
    "hyperclovax": _LLAMA | {"residual_multiplier": 0.5, "logits_scaling": 0.5},
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": _LLAMA,
    "lfm2": _LLAMA | {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": _LLAMA | _WIDE_HEADS | {"layer_types": ["conv", "full_attention"] * 2},
    "minicpm3": _LLAMA | _LATENT,
    "ministral": _LLAMA | _WIDE_HEADS | _SLIDING,
    "ministral3": _LLAMA | _WIDE_HEADS,
    "modernbert-decoder": _HEADS | {"local_attention": 8, "global_attn_every_n_layers": 2},
    "llava": _LLAMA | {"model_type": "llama"},
    "mistral3": _LLAMA | _WIDE_HEADS | {"model_type": "ministral3"},
    "mpt": {"d_model": 32, "n_heads": 4, "expansion_ratio": 3, "max_seq_len": CONTEXT},
    "nanochat": _LLAMA,
    "nemotron": _LLAMA,
    "olmo": _LLAMA | {"clip_qkv": 3.0},
    "olmo3": _LLAMA | _SLIDING,
    "olmo_hybrid": _LLAMA | _LINEAR,
    "persimmon": _HEADS,
    "phi": _LLAMA,
    "qwen3_5_text": _LLAMA | _WIDE_HEADS | _LINEAR,
    "qwen3_vl": _LLAMA
    | _WIDE_HEADS
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "seed_oss": _LLAMA | _WIDE_HEADS,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA | _SLIDING,
    "vaultgemma": _LLAMA | _WIDE_HEADS | _SLIDING,
    "xglm": {"d_model": 32, "attention_heads": 4, "ffn_dim": 80, "max_position_embeddings": CONTEXT},
    "youtu": _LLAMA | _LATENT,
}

_VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_with_vision": ("gemma3", {"vision_config": _VISION | {"image_size": 28, "patch_size": 14}}),
    "got_ocr2": (
        "got_ocr2",
        {"vision_config": _VISION | {"image_size": 32, "patch_size": 16, "mlp_dim": 20, "output_channels": 8}},
    ),
    "llava": ("llava", {"vision_config": _VISION | {"image_size": 28, "patch_size": 14}}),
    "mistral3": ("mistral3", {"vision_config": _VISION | {"image_size": 28, "patch_size": 14}}),
    "qwen3_vl": ("qwen3_vl", {"vision_config": {"hidden_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}}),
}
"""Name here -> model type and further fields of models that hold their text model beside others."""

SHAPES = _TABLE | _FOUND
ARCHITECTURES = list(_TABLE)
"""The model types that run through every parity test; "gemma3" is its text model."""

FOUND = list(_FOUND)
"""The other types, which run through one lean suite."""
