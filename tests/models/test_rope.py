"""Rotary embedding against transformers': frequencies bit by bit, tables at far positions, the rotation itself."""

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen_dist.hf_config import parse_model_config
from qwen_dist.models.config import RopeConfig
from qwen_dist.models.rope import inverse_frequencies, rope_table
from qwen_dist.ops.rotary import rotate

# The thetas of released checkpoints and the head sizes of released and coming ones.
THETAS, HEAD_DIMS = (1e4, 5e5, 1e6, 5e6, 1e7), (64, 80, 128, 256)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn attention_factor": YARN | {"attention_factor": 0.7},
    "yarn everything": YARN
    | {"factor": 2.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.2},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def both(rope: dict, theta: float, head_dim: int, max_positions: int = 131072) -> tuple[RopeConfig, Qwen2RotaryEmbedding]:
    config = Qwen2Config(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        rope_parameters=rope | {"rope_theta": theta},
    )
    return parse_model_config(config.to_dict()).rope, Qwen2RotaryEmbedding(config)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_transformers_to_the_last_bit(name):
    """In every table at most one entry differs, by one unit in the last place (float32 powers of PyTorch do so).

    "yarn everything" subtracts two such numbers, and may be off by two units there.
    """
    for theta in THETAS:
        for head_dim in HEAD_DIMS:
            ours, reference = both(ROPES[name], theta, head_dim)
            expected = reference.inv_freq.numpy()
            units = np.abs(inverse_frequencies(ours, head_dim).view(np.int32) - expected.view(np.int32))
            assert np.count_nonzero(units) <= 1
            assert units.max() <= (2 if name == "yarn everything" else 1)
            assert ours.attention_factor == reference.attention_scaling


def test_frequencies_in_float64_are_the_formula():
    ours, _ = both(ROPES["default"], 1e6, 128)
    expected = np.array([1e6 ** -(2 * pair / 128) for pair in range(64)])
    np.testing.assert_allclose(inverse_frequencies(ours, 128, np.float64), expected, rtol=1e-15)


@pytest.mark.parametrize("name", ["default", "yarn", "llama3"])
def test_tables_at_far_positions(name):
    ours, reference = both(ROPES[name], 1e6, 64)
    positions = np.concatenate([np.arange(600), np.arange(32000, 32768)])[None]
    expected_cos, expected_sin = reference(torch.zeros(1), torch.tensor(positions))
    cos, sin = rope_table(ours, 64, positions, "float32")
    np.testing.assert_allclose(cos, expected_cos[..., :32], rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, expected_sin[..., :32], rtol=0, atol=2e-7)


def test_dynamic_takes_each_rows_own_length():
    ours, _ = both(ROPES["dynamic"], 1e4, 16, max_positions=200)
    lengths = (7, 200, 201, 1000)
    positions = np.full((len(lengths), max(lengths)), -1)
    for row, length in enumerate(lengths):
        positions[row, :length] = range(length)
    cos, sin = rope_table(ours, 16, positions, "float32")
    for row, length in enumerate(lengths):
        _, reference = both(ROPES["dynamic"], 1e4, 16, max_positions=200)  # it remembers the longest it has seen
        expected_cos, expected_sin = reference(torch.zeros(1), torch.arange(length)[None])
        # An angle of 1,000 radians has 6e-5 of rounding in float32.
        np.testing.assert_allclose(cos[row, :length], expected_cos[0, :, :8], rtol=0, atol=1e-4)
        np.testing.assert_allclose(sin[row, :length], expected_sin[0, :, :8], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_is_a_complex_product_in_at_least_float32(dtype):
    ours, _ = both(ROPES["default"], 1e4, 16)
    x_BTNH = jax.random.normal(jax.random.key(0), (2, 50, 3, 16)).astype(dtype)
    positions = np.arange(100).reshape(2, 50)
    rotated = rotate(x_BTNH, *rope_table(ours, 16, positions, dtype))
    exact = np.asarray(x_BTNH, np.float64)
    pairs = (exact[..., :8] + 1j * exact[..., 8:]) * np.exp(
        1j * positions[..., None, None] * inverse_frequencies(ours, 16, np.float64)
    )
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    assert rotated.dtype == dtype
    rounding = {"float32": 2e-5, "bfloat16": 2**-8}[dtype]  # bfloat16: one rounding of the result, none in between
    np.testing.assert_allclose(np.asarray(rotated, np.float64), expected, rtol=rounding, atol=2e-5)
