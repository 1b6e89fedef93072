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
