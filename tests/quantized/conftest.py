"""A fixture that makes a checkpoint of a small model with packed weights."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

# Sizes that groups of 32 divide; the weights of one layer, as transformers names them.
SIZES = {
    "qwen3": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3_moe": {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4},
    "qwen3_5": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
NOT_CONVERTED = ("lm_head", "mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b", "embed_tokens", "conv1d")


@pytest.fixture(scope="session")
def small(tiny_checkpoint):
    """A function (family) -> directory of a small random checkpoint with sizes that groups of 32 divide."""
    return lambda family: tiny_checkpoint(family, **SIZES[family] | {"num_hidden_layers": 2})


@pytest.fixture(scope="session")
def small_directory(tiny_directory):
    """As `small`, with a tokenizer."""
    return lambda family: tiny_directory(family, **SIZES[family] | {"num_hidden_layers": 2})


@pytest.fixture(scope="session")
def packed_checkpoint(small, tmp_path_factory):
    """A function (family, packer) -> (directory, directory with the same weights dequantised, in float32)."""

    def make(family, packer, change=lambda tensors: None):
        rng = np.random.default_rng(0)
        tensors = safetensors.numpy.load_file(small(family) / "model.safetensors")
        packed, plain = {}, {}
        for name, array in tensors.items():
            layer = name.removesuffix(".weight")
            if ".experts." in name and not name.endswith(".weight"):  # fused; packed ones are one matrix for each expert
                halves = {"gate_proj": array[:, : array.shape[1] // 2], "up_proj": array[:, array.shape[1] // 2 :]}
                parts = halves if layer.endswith("gate_up_proj") else {"down_proj": array}
                for expert in range(len(array)):
                    for part, of_part in parts.items():
                        one = f"{name.rpartition('.')[0]}.{expert}.{part}"
                        leaves, expected = packer.tensors(rng, *of_part.shape[1:])
                        packed |= {f"{one}.{leaf}": value for leaf, value in leaves.items()}
                        plain[f"{one}.weight"] = expected
            elif array.ndim == 2 and not layer.endswith(NOT_CONVERTED):
                leaves, plain[name] = packer.tensors(rng, *array.shape)
                packed |= {f"{layer}.{leaf}": value for leaf, value in leaves.items()}
            else:
                packed[name] = plain[name] = array
        change(packed)
        directories = []
        for values, quantization in ((packed, {"quantization_config": packer.config()}), (plain, {})):
            directory = tmp_path_factory.mktemp("packed")
            shutil.copytree(small(family), directory, dirs_exist_ok=True)
            safetensors.numpy.save_file(values, directory / "model.safetensors")
            config = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps(config | quantization))
            directories.append(directory)
        return directories

    return make
