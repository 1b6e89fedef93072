"""The float64 reference computes entirely in float64: nothing is rounded to float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_dist.families import FAMILIES
from qwen_dist.parity.inputs import random_tokens
from qwen_dist.parity.reference import Reference, UpcastToFloat64

pytestmark = pytest.mark.parity

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": YARN,
    "llama3": LLAMA3,
}
INPUTS = random_tokens(311, 40, 2)
COLUMNS = np.arange(40)


class NoFloat32(TorchDispatchMode):
    """Fails at the first operation that makes a float tensor of less than 64 bits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                assert value.dtype == torch.float64, f"{func} gives {value.dtype}"
        return result


CASES = [
    pytest.param(family, rope, marks=[] if family == "qwen2" or rope == "default" else pytest.mark.slow)
    for family in FAMILIES
    for rope in ROPES
]


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_no_operation_gives_float32(tiny_checkpoint, family, rope):
    # Two layers: in a mixture of experts the first is dense.
    checkpoint = tiny_checkpoint(family, num_hidden_layers=2, max_position_embeddings=32, rope_parameters=ROPES[rope])
    reference = Reference(checkpoint, "float64")
    with NoFloat32():
        reference.forward(INPUTS, COLUMNS)
        reference.decode(INPUTS, 2)
        reference.gradient(INPUTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_without_upcasting_has_float32_errors(tiny_checkpoint, family):
    """Without upcasting the test above fails and the results have errors of about 1e-8."""
    attention = {"layer_types": ["full_attention"]} if family not in ("qwen2_moe", "qwen3_moe") else {}
    checkpoint = tiny_checkpoint(family, num_hidden_layers=1, **attention)
    inputs = random_tokens(311, 40, 1)  # without padding, whose float64 mask is -inf in float32 and gives NaN
    upcast = Reference(checkpoint, "float64").forward(inputs, COLUMNS)
    reference = Reference(checkpoint, "float64")
    reference.is_upcast = False
    with NoFloat32(), pytest.raises(AssertionError, match=r"float32"):
        reference.forward(inputs, COLUMNS)
    without_upcasting = reference.forward(inputs, COLUMNS)
    for name in ("layers.0.input_layernorm", "layers.0.self_attn.q_rope", "layers.0.self_attn.weights", "norm"):
        error = np.abs(upcast[name] - without_upcasting[name]).max()
        assert 1e-10 < error < 1e-4, f"{name}: {error}"


def test_norm_rope_and_softmax_agree_with_extended_precision(tiny_checkpoint):
    """Recomputed in 80-bit floats from the reference's own inputs: equal to the last bits of float64."""
    checkpoint = tiny_checkpoint("qwen3", num_hidden_layers=1)
    reference = Reference(checkpoint, "float64")
    inputs = random_tokens(311, 24, 1)
    found = {name: x.astype(np.longdouble) for name, x in reference.forward(inputs, np.arange(24)).items()}
    weight = reference.parameters()["layers.0.input_layernorm.weight"].astype(np.longdouble)

    x = found["embed_tokens"]
    norm = weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + np.longdouble(reference.model.config.rms_norm_eps))
    assert np.abs(norm - found["layers.0.input_layernorm"]).max() < 4e-15

    q, k = found["layers.0.self_attn.q_norm"], found["layers.0.self_attn.k_norm"]
    half = q.shape[-1] // 2
    theta = np.longdouble(reference.model.config.rope_parameters["rope_theta"])
    angles = np.arange(24, dtype=np.longdouble)[:, None, None] * theta ** (-np.arange(half, dtype=np.longdouble) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    turned = {}
    for name, value in (("q", q), ("k", k)):
        a, b = value[..., :half], value[..., half:]
        turned[name] = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        assert np.abs(turned[name] - found[f"layers.0.self_attn.{name}_rope"]).max() < 4e-14

    keys = turned["k"].repeat(q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("btnh,bsnh->bnts", turned["q"], keys) / np.sqrt(np.longdouble(q.shape[-1]))
    scores = np.where(np.tri(24, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert np.abs(weights - found["layers.0.self_attn.weights"]).max() < 1e-13


def test_the_mode_upcasts_casts_constants_and_defaults_until_the_end_of_its_block():
    half = torch.ones(2, dtype=torch.float16)
    with UpcastToFloat64():
        assert half.float().dtype == torch.float64
        assert half.to(torch.float32).dtype == torch.float64
        assert half.to(dtype=torch.float32).dtype == torch.float64
        assert torch.arange(2, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(2).dtype == torch.float64
        assert torch.nn.functional.softmax(half, dim=-1, dtype=torch.float32).dtype == torch.float64
        assert half.to(torch.bfloat16).dtype == torch.bfloat16
    assert half.float().dtype == torch.zeros(2).dtype == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hooks_do_not_change_the_model(tiny_checkpoint, attention):
    """The logits of the hooked reference are bit-identical to those of transformers without hooks."""
    checkpoint = tiny_checkpoint("qwen3")
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attention).eval()
    inputs = random_tokens(311, 40, 2)
    with torch.no_grad():
        expected = plain(
            input_ids=torch.from_numpy(inputs.tokens).long(),
            attention_mask=torch.from_numpy(inputs.is_real).long(),
            position_ids=torch.from_numpy(np.maximum(inputs.positions, 0)).long(),
        ).logits.numpy()
    found = Reference(checkpoint, "float32", attention).forward(inputs, COLUMNS)["logits"]
    np.testing.assert_array_equal(found, expected)
