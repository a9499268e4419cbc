"""Tiny configurations of every causal language model of transformers, and which of them CuMo runs."""

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 50
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LEFT_OUT = "left out"
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
# model_type -> what it needs besides SIZES; head transformations have values that change the logits
OWN_SIZES = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blenderbot-small": {"encoder_layers": 1, "decoder_layers": 1},
    "codegen": {"rotary_dim": 8, "num_attention_heads": 4},
    "ctrl": {"dff": 48},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gemma3n_text": {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "granite_swa": {"logits_scaling": 3.0},
    "granitemoehybrid": MAMBA
    | {
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
        "logits_scaling": 3.0,
    },
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hyperclovax": {"logits_scaling": 3.0},
    "jamba": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8},
    "ministral": {"head_dim": 16},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "prophetnet": dict.fromkeys(
        ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"), LEFT_OUT
    ),
    "qwen3_5_text": LINEAR
    | {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 32,
        "head_dim": 16,
    },
    "xglm": {"ffn_dim": 48, "attention_heads": 2, "num_layers": 2},
    "xlnet": {"max_position_embeddings": LEFT_OUT, "d_head": 16},
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 2,
        "n_mamba_heads": 2,
    },
}

RUN = """
apertus arcee bamba biogpt bitnet bloom codegen cohere cohere2 ctrl cwm deepseek_v3 deepseek_v32 diffllama
doge ernie4_5 exaone4 falcon gemma gemma2 gemma3_text gemma4_unified_text glm glm4 glm_moe_dsa gpt-sw3
gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granite_swa granitemoehybrid helium
hrm_text hunyuan_v1_dense hyperclovax jais2 jamba lfm2 llama minicpm3 ministral ministral3 mistral mixtral
mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid opt persimmon phi phi3 qwen2 qwen3 qwen3_5_text
seed_oss smollm3 stablelm starcoder2 vaultgemma xglm youtu zamba""".split()

_REFUSED = {
    "which has experts or routers": """
        afmoe aria_text axk1 axk2 cohere2_moe deepseek_v2 deepseek_v4 dots1 ernie4_5_moe exaone_moe
        flex_olmo glm4_moe glm4_moe_lite gpt_oss granitemoe granitemoe_swa granitemoeshared
        hunyuan_v1_moe hy_v3 hy_v4 inkling_text jetmoe kimi_linear laguna lfm2_moe llama4_text
        longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text nemotron_h olmoe
        phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text solar_open zaya""",
    "is_encoder_decoder is True": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet
        whisper""",
    "is_decoder is False, its attention is bidirectional": """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
        roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""",
    "it has parts of its own": """
        blt emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 llama4 mllama moshi
        phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp""",
    # transformers 5.24 gave the recurrent ones a cache
    "does not take (inputs_embeds|past_key_values|cache|attention_mask|use_cache)|no layer has attention": """
        cpmant falcon_mamba mamba mamba2 openai-gpt reformer rwkv xlm xlnet xlstm""",
    "something else with input_ids than with their inputs_embeds": "falcon_h1 gemma3n_text",
    "does not run with inputs_embeds alone": "gemma4_text",
    "its decoder returns no (past_key_values|cache)": "recurrent_gemma",
    "has weights besides decoder and output embedding": "modernbert-decoder",
    "must be a text model of transformers": "gemma4_assistant gemma4_unified_assistant trocr",
}
REFUSED = {kind: reason for reason, kinds in _REFUSED.items() for kind in kinds.split()}

# no tiny configuration: transformers fails with these sizes, or the configuration needs those of other models
WITHOUT = ("cohere_compass_text", "dbrx", "musicgen", "musicgen_melody", "zamba2")


def decoder_config(model_type: str, **options) -> PreTrainedConfig:
    """A tiny configuration of a causal language model."""
    values = SIZES | OWN_SIZES.get(model_type, {}) | options
    values = {key: value for key, value in values.items() if value != LEFT_OUT}
    return CONFIG_MAPPING[model_type](**values)
