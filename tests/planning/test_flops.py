"""The table of flops against traced programs and known counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from shapes import QWEN3_5_397B, QWEN3_8_27B, QWEN3_NEXT_80B
from traced_flops import product_flops

from qwen_dist.hf_config import parse_model_config
from qwen_dist.models.config import DeltaNetConfig, LayerConfig
from qwen_dist.ops.delta_rule import DeltaInputs, delta_rule
from qwen_dist.planning.flops import active_weights, mixing_flops

# Key heads, value heads of each, channels of keys and values: all different.
G, R, K, V = 2, 3, 8, 12


def traced(num_tokens: int, *, backward: bool) -> float:
    """The flops per token of the rule's products, or of the rule and its gradient."""

    def run(inputs: DeltaInputs) -> jax.Array:
        return delta_rule(inputs)[0].sum()

    tokens = (1, num_tokens, G)
    shapes = [(*tokens, K), (*tokens, K), (*tokens, R, V), (*tokens, R), (*tokens, R)]
    inputs = DeltaInputs(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return product_flops(jax.make_jaxpr(jax.grad(run) if backward else run)(inputs).jaxpr) / num_tokens


@pytest.fixture
def tiny():
    config = parse_model_config(QWEN3_8_27B)
    return dataclasses.replace(config, delta_net=DeltaNetConfig(G, R, K, V, 4, False))


@pytest.mark.parametrize("num_tokens", [32, 256])
def test_the_delta_rule_in_chunks_and_its_gradient(tiny, num_tokens):
    flops = mixing_flops(tiny, LayerConfig("delta_net"), num_tokens)
    assert flops.forward == traced(num_tokens, backward=False)
    assert flops.forward + flops.backward == traced(num_tokens, backward=True)
    # The products with the state before each chunk.
    assert 0 < flops.in_scan < flops.forward


def test_a_step_of_the_delta_rule(tiny):
    """Besides its products it decays the state (1 flop an element) and adds an outer product to it (2)."""
    flops = mixing_flops(tiny, LayerConfig("delta_net"), 1)
    assert flops.forward == traced(1, backward=False) + 3 * G * R * K * V


@pytest.mark.parametrize(
    ("hf", "projections", "step"), [(QWEN3_NEXT_80B, 67.4, 3.67), (QWEN3_8_27B, 231.7, 5.51), (QWEN3_5_397B, 235.9, 7.34)]
)
def test_millions_of_flops_of_a_delta_net_in_released_models(hf, projections, step):
    """Per token and layer; known counts."""
    config = parse_model_config(hf)
    net = config.delta_net
    channels, values = net.num_key_heads * net.conv_channels, net.num_key_heads * net.group_values
    shapes = {"in_proj": (channels + values + 2 * net.num_key_heads * net.values_per_key, config.hidden_size)}
    weights = active_weights(config, shapes | {"out_proj": (config.hidden_size, values)})
    assert 2e-6 * sum(weights.values()) == pytest.approx(projections, abs=0.05)
    assert 1e-6 * mixing_flops(config, config.layers[0], 1).forward == pytest.approx(step, abs=0.005)
