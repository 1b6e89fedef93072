"""config.json of released model sizes."""

from typing import Any


def qwen3(num_layers: int, hidden: int, heads: int, mlp: int, **values: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": False,
    } | values


QWEN3_8B = qwen3(36, 4096, 32, 12288)
QWEN3_32B = qwen3(64, 5120, 64, 25600)
# Large enough that its arrays outweigh what the compiler adds to any program, and shallow so that it compiles fast.
SMALL = qwen3(3, 1024, 16, 4096, vocab_size=32768)


def hybrid(
    model_type: str, num_layers: int, hidden: int, heads: tuple[int, int], value_heads: int, **values: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": 248320,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    } | values


def experts(number: int, per_token: int, size: int) -> dict[str, int]:
    sizes = {"moe_intermediate_size": size, "shared_expert_intermediate_size": size}
    return {"num_experts": number, "num_experts_per_tok": per_token} | sizes


QWEN3_NEXT_80B = hybrid(
    "qwen3_next", 48, 2048, (16, 2), 32, **experts(512, 10, 512), vocab_size=151936, norm_topk_prob=True
)
QWEN3_8_27B = hybrid("qwen3_5_text", 64, 5120, (24, 4), 48, intermediate_size=17408)
QWEN3_5_397B = hybrid("qwen3_5_moe_text", 60, 4096, (32, 2), 64, **experts(512, 10, 1024))
# A delta net with attention after it; sizes that mix up nothing: two value heads a key head, keys narrower than values.
SMALL_HYBRID = hybrid("qwen3_5_text", 2, 1024, (16, 4), 16, intermediate_size=2048, vocab_size=8192) | {
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_key_head_dim": 64,
    "full_attention_interval": 2,
}
SMALL_HYBRID_MOE = SMALL_HYBRID | {"model_type": "qwen3_5_moe_text"} | experts(16, 2, 1024)
