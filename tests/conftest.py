"""Eight CPU devices for every test, set before jax starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax

jax.config.update("jax_num_cpu_devices", 8)

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

REAL_CHECKPOINT = pathlib.Path.home() / ".cache/qwen_dist/qwen2.5-coder-0.5b-instruct"

# Sizes that hide nothing: heads × head_dim is not hidden_size, one key/value head or several, a vocabulary that is not even.
TINY_SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
    "qwen3": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 40, "head_dim": 16},
}


@pytest.fixture(scope="session")
def real_checkpoint() -> pathlib.Path:
    """The directory of Qwen2.5-Coder-0.5B-Instruct, when it has been built (CONTRIBUTING.md says how)."""
    if not (REAL_CHECKPOINT / "config.json").exists():
        pytest.skip(f"the real checkpoint is not at {REAL_CHECKPOINT}")
    return REAL_CHECKPOINT


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """A function (family, **config values) -> directory of a random checkpoint that transformers itself wrote."""
    made: dict[str, pathlib.Path] = {}

    def make(family: str, **values: Any) -> pathlib.Path:
        import torch
        import transformers

        key = f"{family} {sorted(values.items())}"
        if key not in made:
            torch.manual_seed(0)
            sizes = {"vocab_size": 311, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 2048}
            config = transformers.AutoConfig.for_model(
                family, **(sizes | {"initializer_range": 0.2} | TINY_SIZES[family] | values)
            )
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():  # norms and biases start as ones and zeros, which hide faults
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
        return made[key]

    return make
