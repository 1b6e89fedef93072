"""Configurations of hybrid models as they are published: each key is read, refused, or known to be neutral."""

import dataclasses

import pytest

from qwen_dist.errors import CheckpointError
from qwen_dist.hf_config import parse_model_config
from qwen_dist.models.config import DeltaNetConfig

ROPE = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"}
ROPE |= {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
# The keys of Qwen3.5-0.8B, and those that Qwen3.6 and Qwen3.8 added.
TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
    "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3584, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "num_attention_heads": 8, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 248320,
    "mamba_ssm_dtype": "float32", "rope_parameters": ROPE, "output_gate_type": "swish",
}  # fmt: skip
QWEN3_5_0_8B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5",
    "text_config": TEXT, "tie_word_embeddings": True, "video_token_id": 248057, "vision_start_token_id": 248053,
    "vision_end_token_id": 248054, "vision_config": {"depth": 12, "hidden_size": 768}, "transformers_version": "4.57.0",
}  # fmt: skip
QWEN3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4, "head_dim": 256,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
    "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MOE_TEXT = {key: value for key, value in TEXT.items() if key not in ("intermediate_size", "mlp_only_layers")} | {
    "model_type": "qwen3_5_moe_text", "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "router_aux_loss_coef": 0.001,
}  # fmt: skip


def nested(**changes):
    return QWEN3_5_0_8B | {"text_config": TEXT | changes}


def test_a_nested_file():
    config = parse_model_config(QWEN3_5_0_8B)
    assert config.family == "qwen3_5" and config.tie_word_embeddings
    assert config.delta_net == DeltaNetConfig(16, 1, 128, 128, 4, has_fused_projections=False)
    assert (config.head_dim, config.rotary_dim, config.rope.theta) == (256, 64, 10_000_000)
    assert [layer.mixer for layer in config.layers] == (["delta_net"] * 3 + ["attention"]) * 6
    assert (config.norm_offset, config.attention_gate, config.qk_norm) == (True, True, True)
    # The same file as a text model's own.
    assert parse_model_config(TEXT) == config
    assert parse_model_config(TEXT | {"model_type": "qwen3_5"}) == config
    # The outer flag counts where the inner one is missing.
    inner = {key: value for key, value in TEXT.items() if key != "tie_word_embeddings"}
    assert parse_model_config(QWEN3_5_0_8B | {"text_config": inner}) == config
    listed = {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6, "full_attention_interval": None}
    assert parse_model_config(nested(**listed)) == config


def test_a_flat_mixture():
    config = parse_model_config(QWEN3_NEXT_80B)
    assert config.delta_net == DeltaNetConfig(16, 2, 128, 128, 4, has_fused_projections=True)
    assert config.rotary_dim == 64 and not config.tie_word_embeddings
    assert {layer.ffn for layer in config.layers} == {"moe"} and len(config.layers) == 48
    assert (config.moe.num_experts, config.moe.shared_expert_size, config.moe.normalize_scores) == (512, 512, True)


def test_a_nested_mixture_always_normalises_its_scores():
    file = {"model_type": "qwen3_5_moe", "text_config": MOE_TEXT, "vision_config": {}}
    config = parse_model_config(file)
    assert config.family == "qwen3_5_moe" and config.moe.normalize_scores and config.moe.experts_per_token == 8
    with pytest.raises(CheckpointError, match="norm_topk_prob is False; this family always normalises"):
        parse_model_config(file | {"text_config": MOE_TEXT | {"norm_topk_prob": False}})


@pytest.mark.parametrize("changes", [{"mamba_ssm_dtype": "bfloat16"}, {"mtp_num_hidden_layers": 3}])
def test_keys_that_change_nothing_here(changes):
    assert parse_model_config(nested(**changes)) == parse_model_config(QWEN3_5_0_8B)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate is False, which is not supported; supported is True"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid', which is not supported; supported is 'swish'"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["linear_attention"] * 23 + ["mamba"]}, "layer_types has 'mamba'; allowed are linear_attention"),
        ({"layer_types": ["full_attention"] * 23}, "layer_types has 23 entries for num_hidden_layers 24"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads 24 is not a multiple of linear_num_key_heads 16"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; it must be at least 2"),
        (
            {"rope_parameters": ROPE | {"partial_rotary_factor": 2}},
            "partial_rotary_factor is 2; it must be a number above 0",
        ),
        (
            {"rope_parameters": ROPE | {"partial_rotary_factor": 0.005}},
            "0.005 of head_dim 256 is not a positive even number",
        ),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": True}}, "partial_rotary_factor is True; it must be"),
        ({"rope_parameters": ROPE | {"unheard_of": 1}}, "does not know unheard_of"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is True, but in text_config False"),
        ({"unheard_of": 1}, "unheard_of = 1 is not understood"),
        ({"model_type": "qwen3_vl_text"}, "it reads images or audio"),
        ({"model_type": "qwen4_exp_text"}, "this generation of Qwen is not"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        parse_model_config(nested(**changes))


def test_unknown_keys_beside_the_text_model():
    with pytest.raises(CheckpointError, match=r"audio_config = .* is not understood"):
        parse_model_config(QWEN3_5_0_8B | {"audio_config": {"depth": 1}})
    given = QWEN3_5_0_8B | {"audio_config": 1, "text_config": TEXT | {"my_note": 2}}
    assert parse_model_config(given, ["audio_config", "text_config.my_note"]) == parse_model_config(QWEN3_5_0_8B)
    with pytest.raises(CheckpointError, match="text_config is 'x'; it must be an object"):
        parse_model_config(QWEN3_5_0_8B | {"text_config": "x"})
    with pytest.raises(CheckpointError, match="quantization_config has unknown keys"):
        parse_model_config(QWEN3_5_0_8B | {"quantization_config": {"quant_method": "fp8", "unheard_of": 1}})


@pytest.mark.parametrize(
    "change",
    [
        {"linear_num_key_heads": 8},
        {"linear_num_value_heads": 32},
        {"linear_key_head_dim": 64},
        {"linear_value_head_dim": 64},
        {"linear_conv_kernel_dim": 3},
        {"full_attention_interval": 3},
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        {"rope_parameters": ROPE | {"rope_theta": 1e6}},
    ],
)
def test_every_key_of_the_delta_net_changes_the_model(change):
    released, changed = parse_model_config(QWEN3_5_0_8B), parse_model_config(nested(**change))
    assert sum(value != dataclasses.asdict(changed)[key] for key, value in dataclasses.asdict(released).items()) == 1
